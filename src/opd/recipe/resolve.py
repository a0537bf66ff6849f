"""Reading a recipe: files and overrides in, a frozen `Recipe` with the origin of every value out; and back to YAML."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from opd.errors import UsageError
from opd.recipe import arguments, places
from opd.recipe.arguments import Arguments, Catalogue
from opd.recipe.explain import Guide, Loc, explain, secret
from opd.recipe.files import written_out
from opd.recipe.layers import compose, shaped
from opd.recipe.sections import Recipe, Table, Use
from opd.recipe.settle import settle
from opd.recipe.tree import Node, Origin, Problem, from_plain, nearest, plain
from opd.recipe.yaml12 import write

_OWN: Final = {"method": ("name",), "reward": ("use", "weight")}


@dataclass(frozen=True)
class Resolved:
    """A recipe, its YAML, and where each value of that came from: `file:line`, `override key=value` or `default`."""

    recipe: Recipe
    origins: Mapping[str, str]
    text: str


def load(
    paths: str | Path | Sequence[str | Path],
    overrides: Sequence[str] = (),
    *,
    look: bool = True,
    methods: Catalogue | None = None,
    rewards: Catalogue | None = None,
) -> Resolved:
    """Read recipe files, the later over the earlier, then `key=value` overrides.

    `look=False` takes paths as they are written, without asking whether they exist. `methods` and `rewards` replace the
    built-in ones. Raises `UsageError` with every problem of every layer.
    """
    several = [paths] if isinstance(paths, (str, Path)) else paths
    return _resolve(*compose(several, overrides), look, _Shelf(methods, rewards))


def build(
    data: Mapping[str, Any],
    *,
    look: bool = True,
    methods: Catalogue | None = None,
    rewards: Catalogue | None = None,
) -> Recipe:
    """A recipe from plain data, the same shape as the YAML with the same checks. For Python and notebooks."""
    tree = shaped(from_plain(dict(data), Origin("recipe", Path.cwd())))
    return _resolve(tree, [], look, _Shelf(methods, rewards)).recipe


def dump(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out. It loads back equal."""
    return write(_written(recipe))


def schema(*, methods: Catalogue | None = None, rewards: Catalogue | None = None) -> dict[str, Any]:
    """The JSON schema of the YAML, with a branch for each method and reward."""
    from opd.recipe import editor

    shelf = _Shelf(methods, rewards)
    return editor.schema(shelf.of("method"), shelf.of("reward"))


@dataclass(frozen=True)
class _Shelf:
    """The functions a recipe may name, imported only when it names one."""

    methods: Catalogue | None
    rewards: Catalogue | None

    def of(self, kind: str) -> Catalogue:
        given = self.methods if kind == "method" else self.rewards
        if given is not None:
            return given
        if kind == "method":
            from opd.method import catalogue

            return catalogue()
        from opd.rewards import KINDS

        return KINDS


def _resolve(tree: Node, problems: list[Problem], look: bool, shelf: _Shelf) -> Resolved:
    tree, found = settle(tree)
    data, lost = written_out(plain(tree), tree, look)
    problems = [*problems, *found, *lost, *_secrets(tree)]
    used, unusable = _used(data, tree, shelf, reported={str(problem.origin) for problem in lost})
    guide = Guide(tree, shelf.of("method"), used)
    values, wrong = _arguments(data, guide)
    problems += [*unusable, *wrong]
    try:
        recipe = Recipe.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        problems += explain(error.errors(include_url=False), guide)
    problems += _impossible(used, values, tree)
    if problems:
        distinct = dict.fromkeys(sorted(problems, key=lambda problem: problem.origin.order))
        raise UsageError(*dict.fromkeys(map(str, distinct)))
    recipe = _with_arguments(recipe, values)
    data = _written(recipe)
    return Resolved(recipe, dict(_origins(data, tree)), write(data))


# --- functions and their arguments -----------------------------------------------------------------------------------


def _uses(data: Any) -> Iterator[tuple[Loc, dict[str, Any]]]:
    """Every mapping that names a function."""
    stages, rewards = data.get("stages"), data.get("reward")
    for i, stage in enumerate(stages if isinstance(stages, list) else ()):
        if isinstance(stage, dict) and isinstance(stage.get("method"), dict):
            yield ("stages", i, "method"), stage["method"]
    for i, reward in enumerate(rewards if isinstance(rewards, list) else ()):
        if isinstance(reward, dict):
            yield ("reward", i), reward


def _kind(loc: Loc) -> str:
    return "reward" if loc[0] == "reward" else "method"


def _used(data: Any, tree: Node, shelf: _Shelf, reported: set[str]) -> tuple[dict[Loc, Arguments], list[Problem]]:
    """The arguments of the function at every place that names one."""
    used: dict[Loc, Arguments] = {}
    problems: list[Problem] = []
    for loc, given in _uses(data):
        key = _OWN[_kind(loc)][0]
        origin = nearest(tree, (*loc, key))[0].origin
        if not isinstance(given.get(key), str) or str(origin) in reported:
            continue
        try:
            used[loc] = _named(given[key], _kind(loc), shelf)
        except UsageError as error:
            problems += [Problem(origin, f"is {given[key]!r}: {sentence}") for sentence in error.problems]
    return used, problems


def _named(name: str, kind: str, shelf: _Shelf) -> Arguments:
    if ".py:" in name:
        return arguments.of(_own(name), given=2 if kind == "reward" else 0)  # reward(prompt, text, ...) -> float
    known = shelf.of(kind)
    if name in known:
        return arguments.of(known[name])
    meant = places.close(name, list(known))
    hint = f"Did you mean {meant}? " if meant else ""
    raise UsageError(f"there is no such {kind}. {hint}There are {', '.join(known)}, or your own as ./file.py:name.")


def _own(name: str) -> Callable[..., Any]:
    """The user's own function. Whatever their file raises is theirs to read: the error and its last line."""
    from traceback import extract_tb

    from opd.method import function

    try:
        return function(name)
    except UsageError:
        raise
    except Exception as error:
        file = name.rpartition(":")[0]
        frames = [f.lineno for f in extract_tb(error.__traceback__) if f.filename == file]
        line = error.lineno if isinstance(error, SyntaxError) else next(reversed(frames), None)
        raise UsageError(f"the file stops with {type(error).__name__}: {error} (line {line}).") from None


def _arguments(data: Any, guide: Guide) -> tuple[dict[Loc, dict[str, Any]], list[Problem]]:
    """The checked arguments of every function, moved out of `data` and into `args`."""
    values: dict[Loc, dict[str, Any]] = {}
    problems: list[Problem] = []
    for loc, given in _uses(data):
        own = _OWN[_kind(loc)]
        slip = None if own[0] in given else places.close(own[0], list(given))  # left to the schema to name
        rest = {key: given.pop(key) for key in list(given) if key not in (*own, slip)}
        if loc in guide.used:
            checked, errors = guide.used[loc].check(rest)
            problems += explain(errors, guide, loc)
            values |= {} if errors else {loc: checked}
    return values, problems


def _impossible(used: Mapping[Loc, Arguments], values: Mapping[Loc, Any], tree: Node) -> Iterator[Problem]:
    """Arguments that are each possible and cannot go together, as the function itself says when it is built."""
    for loc, checked in values.items():
        try:
            used[loc].build(checked)
        except (ValueError, UsageError) as error:
            yield Problem(nearest(tree, loc)[0].origin, f"cannot be built: {error}.")


def _with_arguments(recipe: Recipe, values: Mapping[Loc, Any]) -> Recipe:
    """The recipe with the arguments as the functions want them: tuples and schedules, not lists and texts."""

    def filled(use: Use, loc: Loc) -> Any:
        return use.model_copy(update={"args": Table(values[loc])})

    stages = tuple(
        stage.model_copy(update={"method": filled(stage.method, ("stages", i, "method"))})
        for i, stage in enumerate(recipe.stages)
    )
    rewards = tuple(filled(reward, ("reward", i)) for i, reward in enumerate(recipe.reward))
    return recipe.model_copy(update={"stages": stages, "reward": rewards})


# --- out -------------------------------------------------------------------------------------------------------------


def _written(recipe: Recipe) -> dict[str, Any]:
    """The recipe as plain data in the shape of the YAML: a stage has only what differs from the recipe's sections."""
    data: dict[str, Any] = recipe.model_dump(mode="json")
    data["teachers"] = {role: _given(teacher) for role, teacher in data["teachers"].items()}
    data = {key: value for key, value in data.items() if value is not None}
    data["reward"] = [_inline(reward) for reward in data["reward"]]
    for stage in data["stages"]:
        stage["method"] = _inline(stage["method"])
        for section in ("train", "speak"):
            stage[section] = {k: v for k, v in stage[section].items() if v != data[section][k]}
    data["stages"] = [{k: v for k, v in stage.items() if v not in (None, {})} for stage in data["stages"]]
    return data


def _given(teacher: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in teacher.items() if value is not None}


def _inline(use: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in use.items() if key != "args"} | dict(use["args"])


def _origins(data: Any, tree: Node, loc: Loc = ()) -> Iterator[tuple[str, str]]:
    """The origin of every scalar, list of scalars and empty mapping."""
    nested = data if isinstance(data, dict) else dict(enumerate(data)) if isinstance(data, list) else {}
    if nested and (isinstance(data, dict) or any(isinstance(v, (dict, list)) for v in nested.values())):
        for key, value in nested.items():
            yield from _origins(value, tree, (*loc, key))
        return
    node, depth = nearest(tree, loc)
    yield ".".join(map(str, loc)), node.origin.label if depth == len(loc) else "default"


def _secrets(node: Node) -> Iterator[Problem]:
    """Values that look like keys of an API: a recipe is stored with its run and mailed around."""
    if isinstance(node.value, str) and secret(node.value):
        yield Problem(node.origin, "looks like a secret key. Take it out: keys are read from the environment.")
    children = node.items.values() if not isinstance(node.value, list) else node.value
    for child in children:
        yield from _secrets(child)
