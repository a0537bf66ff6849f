"""Recipe files and `key=value` overrides, composed into one tree whose every value knows where it was written.

A later file wins over an earlier one: mappings merge key by key, everything else is replaced. The arguments of a method
belong to it, so a `method` of another name replaces all of it. An empty section (`train:` with nothing under it) says
nothing. Over a list of stages a mapping changes them by name, and null takes one out: an ablation is one line.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Final

from opd.errors import UsageError
from opd.recipe.tree import Node, Origin, Problem
from opd.recipe.yaml12 import read

# A word in these places stands for a mapping with one key; anything but a list, where a list belongs, is a list of one.
_SHORT: Final = {
    ("method",): "name",
    ("stages", "*", "method"): "name",
    ("reward", "*"): "use",
    ("data", "train", "*"): "path",
    ("data", "dev", "*"): "path",
}
_LISTS: Final = {("reward",), ("data", "train"), ("data", "dev")}
_SECTIONS: Final = {"student", "teachers", "critic", "data", "speak", "train", "eval", "run"}


def compose(paths: Sequence[str | Path], overrides: Sequence[str]) -> tuple[Node, list[Problem]]:
    """All layers as one tree, shorthands written out, and what is wrong so far.

    Raises `UsageError` when a file cannot be read at all: what follows from a part of a recipe would mislead.
    """
    problems: list[Problem] = []
    layers = [_file(Path(path), number, problems) for number, path in enumerate(paths)]
    tree = Node({}, Origin(str(paths[0]) if paths else "recipe", Path.cwd()))
    for number, layer in enumerate(layer for layer in layers if layer is not None):
        tree = shaped(_over(tree, layer, problems)) if number else layer
    for number, override in enumerate(overrides):
        tree = _override(tree, override, len(paths) + number, problems)
    if None in layers:
        raise UsageError(*map(str, problems))
    return tree, problems


def _file(path: Path, layer: int, problems: list[Problem]) -> Node | None:
    """One file, which must be a mapping; or None and a problem."""
    place = path.expanduser()
    whole = Origin(str(path), place.absolute().parent, (layer, 0))
    try:
        text = place.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        problems.append(Problem(whole, f"Not UTF-8 text (byte {error.start}). Save it as UTF-8."))
        return None
    except OSError as error:
        problems.append(Problem(whole, _unreadable(place, error)))
        return None
    node, found = read(text, lambda line: replace(whole, label=f"{path}:{line}", order=(layer, line)))
    problems += found
    if node is None:
        return None
    if isinstance(node.value, dict):
        return shaped(node)
    empty = node.value is None
    remedy = "Start from one in recipes/." if empty else "A recipe is a mapping: student, data, and so on."
    problems.append(Problem(node.origin, f"{'Nothing' if empty else 'No mapping'} in this file. {remedy}"))
    return None


def shaped(node: Node, path: tuple[str, ...] = ()) -> Node:
    """The shorthands written out, origins kept. Applied twice it changes nothing."""
    if path in _LISTS and node.value is not None and not isinstance(node.value, list):
        node = Node([node], node.origin)
    if path in _SHORT and isinstance(node.value, str):
        node = Node({_SHORT[path]: node}, node.origin)
    if isinstance(node.value, list):
        return replace(node, value=[shaped(child, (*path, "*")) for child in node.value])
    by_name = path == ("stages",)
    entries = {k: shaped(v, (*path, "*" if by_name else k)) for k, v in node.items.items()}
    return replace(node, value=entries) if entries else node


def _over(below: Node, above: Node, problems: list[Problem]) -> Node:
    try:
        return merge(below, above)
    except _NoPlaceError as error:
        problems.append(Problem(above.items["stages"].origin, str(error)))
        return below


def merge(below: Node, above: Node, path: tuple[str, ...] = ()) -> Node:
    """`above` over `below`."""
    if path == ("stages",) and isinstance(below.value, list) and isinstance(above.value, dict):
        for name, change in above.value.items():
            below = _stage(below, name, partial(_merged, change))
        return below
    if above.value is None and len(path) == 1 and path[0] in _SECTIONS:
        return below
    if not isinstance(below.value, dict) or not isinstance(above.value, dict):
        return above
    if path[-1:] == ("method",) and "name" in above.items and above.items["name"].value != _name(below):
        return above
    entries = dict(below.value)
    for key, child in above.value.items():
        entries[key] = merge(entries[key], child, (*path, key)) if key in entries else child
    return replace(below, value=entries)


def _stage(stages: Node, name: str, change: Callable[[Node], Node]) -> Node:
    """The list with the stage of this name changed, or without it where the change is null."""
    items = list(stages.value) if isinstance(stages.value, list) else []
    names = [_called(stage) for stage in items]
    if name not in names:
        shown = ", ".join(str(n) for n in names if n) or "none with a name"
        raise _NoPlaceError(f"names no stage `{name}` ({stages.origin.label}); there are {shown}.")
    at = names.index(name)
    changed = change(items[at])
    return replace(stages, value=[*items[:at], *([] if changed.value is None else [changed]), *items[at + 1 :]])


def _called(stage: Node) -> object:
    """A stage's name: its own, or its method's."""
    method = stage.items.get("method", stage)
    own = stage.items.get("name") or method.items.get("name", method)
    return own.value


def _merged(change: Node, stage: Node) -> Node:
    return merge(stage, change, ("stages", "*"))


def _name(method: Node) -> object:
    return method.items["name"].value if "name" in method.items else None


def _override(tree: Node, text: str, layer: int, problems: list[Problem]) -> Node:
    """The tree with one override; as it was, and a problem, when that cannot be read or points at nothing."""
    key, equals, raw = text.partition("=")
    origin = Origin(f"override {text}", Path.cwd(), (layer, 0))
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        problems.append(Problem(origin, "Not of the form key=value, such as train.lr=1e-6."))
        return tree
    value, found = read(raw, lambda _: replace(origin, key=".".join(parts)))
    problems += found
    if value is None:
        return tree
    try:
        return shaped(_put(tree, parts, value, ()))
    except _NoPlaceError as error:
        problems.append(Problem(origin, str(error)))
        return tree


class _NoPlaceError(Exception):
    """An override points at nothing."""


def _put(node: Node, parts: Sequence[str], leaf: Node, done: tuple[str, ...]) -> Node:
    """The tree with `leaf` at `parts`. Mappings on the way are made; a list of one may be passed through unnamed."""
    if not parts:
        return leaf
    part, rest = parts[0], parts[1:]
    if isinstance(node.value, list):
        items = list(node.value)
        numbers = {str(i): i for i in range(len(items))}
        if done == ("stages",) and part in map(_called, items):
            return _stage(node, part, lambda stage: _put(stage, rest, leaf, (*done, part)))
        if not part.isdecimal() and len(items) == 1:
            return replace(node, value=[_put(items[0], parts, leaf, done)])
        if part not in numbers:
            holds = f"has the items 0 to {len(items) - 1}" if items else "is empty"
            raise _NoPlaceError(f"`{'.'.join(done)}` ({node.origin.label}) {holds}, no `{part}`.")
        items[numbers[part]] = _put(items[numbers[part]], rest, leaf, (*done, part))
        return replace(node, value=items)
    if node.value is not None and not isinstance(node.value, dict):
        raise _NoPlaceError(
            f"`{'.'.join(done)}` is {node.value!r} ({node.origin.label}), which has no key `{part}` to set."
        )
    made = Node(None, replace(leaf.origin, key=".".join((*done, part))))
    below = node.items.get(part, made)
    return replace(node, value={**node.items, part: _put(below, rest, leaf, (*done, part))})


def _unreadable(path: Path, error: OSError) -> str:
    if path.is_dir():
        inside = sorted(p.name for p in path.glob("*.y*ml"))
        return "A folder, not a recipe." + (f" In it: {', '.join(inside[:5])}." if inside else "")
    return f"Not found.{nearby(path)}" if isinstance(error, FileNotFoundError) else f"Cannot be read: {error.strerror}."


def nearby(path: Path) -> str:
    """What lies where a file should be, likeliest first: a sentence after a space, or nothing."""
    if not path.parent.is_dir():
        return f" There is no folder {path.parent}."
    names = sorted(p.name for p in path.parent.iterdir() if not p.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, 1, 0.6)
    if close:
        return f" Did you mean {path.parent / close[0]}?"
    alike = [name for name in names if path.suffix and name.endswith(path.suffix)]
    return f" In that folder: {', '.join(alike[:5])}." if alike else ""
