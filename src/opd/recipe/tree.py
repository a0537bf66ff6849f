"""Plain data that knows where it was written, and problems that say so."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

Scalar = str | int | float | bool | None


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: `label` for people, `folder` for relative paths, `order` to sort, the dotted `key`."""

    label: str
    folder: Path
    order: tuple[int, int] = (0, 0)
    key: str = ""


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its origin."""

    value: Scalar | dict[str, Node] | list[Node]
    origin: Origin

    @property
    def items(self) -> dict[str, Node]:
        """The entries of a mapping; none for anything else."""
        return self.value if isinstance(self.value, dict) else {}

    @property
    def given(self) -> dict[str, Node]:
        """The entries that are not null."""
        return {key: node for key, node in self.items.items() if node.value is not None}


@dataclass(frozen=True, slots=True)
class Problem:
    """What is wrong with one value. `sentence` goes on after the key, or stands alone where there is none."""

    origin: Origin
    sentence: str

    def __str__(self) -> str:
        key = f"`{self.origin.key}` " if self.origin.key else ""
        return f"{self.origin.label}: {key}{self.sentence}"


def plain(node: Node) -> Any:
    """The value without origins."""
    if isinstance(node.value, dict):
        return {key: plain(child) for key, child in node.value.items()}
    if isinstance(node.value, list):
        return [plain(child) for child in node.value]
    return node.value


def from_plain(value: Any, origin: Origin) -> Node:
    """Plain data as a tree, all of one origin but for the keys."""
    if isinstance(value, dict):
        return Node({str(k): from_plain(v, under(origin, k)) for k, v in value.items()}, origin)
    if isinstance(value, (list, tuple)):
        return Node([from_plain(v, under(origin, i)) for i, v in enumerate(value)], origin)
    return Node(os.fspath(value) if isinstance(value, os.PathLike) else value, origin)


def under(origin: Origin, part: object) -> Origin:
    """The same place, one key deeper."""
    return replace(origin, key=f"{origin.key}.{part}" if origin.key else str(part))


def nearest(tree: Node, loc: tuple[int | str, ...]) -> tuple[Node, int]:
    """The node at `loc`, or the deepest one on the way to it, and how many parts of `loc` that is."""
    node = tree
    for depth, part in enumerate(loc):
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[str(part)]
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        else:
            return node, depth
    return node, len(loc)
