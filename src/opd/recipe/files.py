"""Paths in a recipe: relative to the file that names them, then to where the command runs; written out in full."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from opd.errors import UsageError
from opd.recipe.explain import Loc, generic
from opd.recipe.layers import nearby
from opd.recipe.places import Place
from opd.recipe.tree import Node, Problem, nearest

# What each place may name besides a path: a model or data set elsewhere, a word, or nothing.
_KINDS: Final[dict[Place, str]] = {
    ("student", "model"): "model",
    ("student", "template"): "template",
    ("teachers", "*", "model"): "model",
    ("teachers", "*", "answers"): "file",
    ("critic", "init"): "model",
    ("data", "train", "*", "path"): "data",
    ("data", "dev", "*", "path"): "data",
    ("stages", "*", "method", "name"): "code",
    ("reward", "*", "use"): "code",
    ("hint", "use"): "code",
    **{("views", name): "code" for name in ("answer", "demonstration", "context", "hint")},
    ("eval", "metric"): "code",
}
_WORDS: Final = {"template": ("auto", "plain"), "model": ("student",)}
_ENDINGS: Final = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".txt", ".gz", ".jinja", ".safetensors", ".py")
_HUB: Final = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")  # owner/name, and a data set's configuration


def written_out(data: Any, tree: Node, look: bool, loc: Loc = ()) -> tuple[Any, list[Problem]]:
    """`data` with every path absolute, and a problem for each that is not there (unless `look` is false)."""
    if isinstance(data, (dict, list)):
        entries = list(data.items() if isinstance(data, dict) else enumerate(data))
        done = {k: written_out(v, tree, look, (*loc, k)) for k, v in entries}
        problems = [problem for _, found in done.values() for problem in found]
        values = {k: value for k, (value, _) in done.items()}
        return (values if isinstance(data, dict) else list(values.values())), problems
    kind = _KINDS.get(generic(loc))
    if kind is None or not isinstance(data, str):
        return data, []
    node, depth = nearest(tree, loc)
    if depth < len(loc):  # a default, which is a word
        return data, []
    value, sentence = _resolve(data, kind, node.origin.folder)
    problem = Problem(node.origin, f"is {data!r}: {sentence}")
    return (value, [problem]) if sentence and look else (value, [])


def _resolve(text: str, kind: str, folder: Path) -> tuple[str, str]:
    """The path in full, or the text as it is; and a sentence when it must be a path and is none."""
    file, colon, name = text.rpartition(":") if kind == "code" else (text, "", "")
    if text.startswith("world:"):
        return text, _of_world(text, kind)
    if text in _WORDS.get(kind, ()) or (kind == "code" and not file.endswith(".py")):
        return text, ""
    path = Path(file).expanduser()
    tried = list(dict.fromkeys([(folder / path).absolute(), path.absolute()]))
    found = next((p for p in tried if p.exists()), None)
    if found is not None:
        return _normal(found) + colon + name, ""
    explicit = path.is_absolute() or file.startswith((".", "~")) or file.lower().endswith(_ENDINGS)
    if kind in ("model", "data") and not explicit and _HUB.fullmatch(file):
        return text, ""
    return _normal(tried[0]) + colon + name, f"{_normal(tried[0])} not found.{nearby(Path(_normal(tried[0])))}"


def _of_world(text: str, kind: str) -> str:
    """Why the built-in world has no such model or task; nothing if it has."""
    from opd import tasks, world

    try:
        world.path(text) if kind == "model" else tasks.task(text.split(":")[1])
    except UsageError as error:
        return str(error)
    return ""


def _normal(path: Path) -> str:
    """Without `..` and `.`, links kept."""
    return os.path.normpath(path)
