"""What is wrong, in sentences: the place, the value that was found, what it must be, and what was probably meant."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

from pydantic_core import ErrorDetails

from opd.recipe import places
from opd.recipe.arguments import Arguments, Catalogue, of
from opd.recipe.places import Place
from opd.recipe.tree import Node, Origin, Problem, nearest

Loc = tuple[int | str, ...]


@dataclass(frozen=True)
class Guide:
    """What `explain` may suggest from: the tree, and the functions that methods and rewards are."""

    tree: Node
    methods: Catalogue
    used: Mapping[Loc, Arguments]  # of the function at stages.N.method and reward.N

    def siblings(self, loc: Loc) -> list[str]:
        """The keys that exist in the mapping at `loc`."""
        names = [key.name for key in places.at(generic(loc))]
        return [*names, *self.used[loc].names] if loc in self.used else names


def generic(loc: Loc) -> Place:
    """A place without its numbers and roles."""
    return tuple("*" if isinstance(p, int) or (i == 1 and loc[0] == "teachers") else p for i, p in enumerate(loc))


def explain(errors: Iterable[ErrorDetails], guide: Guide, base: Loc = ()) -> list[Problem]:
    """Pydantic's findings as problems, `base` in front of their places. Several about one value become one."""
    found = list(errors)
    wanted: dict[Origin, list[str]] = {}
    problems: dict[Origin, Problem] = {}
    meant = _meant(found, guide, base)
    for error in found:
        loc = (*base, *error["loc"])
        node, depth = nearest(guide.tree, loc)
        if (
            error["type"] == "too_short"
            and isinstance(node.value, list)
            and len(node.value) >= error["ctx"]["min_length"]
        ):
            continue  # pydantic counts valid items only; what is wrong with the others is said where they are
        if error["type"] == "missing" and loc in meant:
            continue  # one slip, one problem: the misspelt key is named
        if error["type"] == "missing":
            problem = _missing(node, loc, depth)
        elif error["type"] == "extra_forbidden":
            problem = Problem(node.origin, _unknown(node, loc, guide))
        else:
            must = wanted.setdefault(node.origin, [])
            must += [m for m in [_must(error)] if m not in must]
            problem = Problem(node.origin, _wrong(node, must, generic(loc[:depth])))
        problems[problem.origin] = problem
    return list(problems.values())


def _meant(errors: list[ErrorDetails], guide: Guide, base: Loc) -> set[Loc]:
    """The keys that unknown keys were probably meant to be."""
    unknown = [(*base, *error["loc"]) for error in errors if error["type"] == "extra_forbidden"]
    return {(*loc[:-1], places.close(str(loc[-1]), guide.siblings(loc[:-1])) or "") for loc in unknown}


def shown(value: Any) -> str:
    """A value as it was written, cut short, and never a secret."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, list):
        scalars = not any(isinstance(v.value, (dict, list)) for v in value) and len(value) <= 4
        return f"[{', '.join(shown(v.value) for v in value)}]" if scalars else f"a list of {len(value)}"
    if not isinstance(value, str):
        return repr(value)
    if secret(value):
        return "a secret"
    return repr(value if len(value) <= 60 else value[:57] + "...")


def secret(text: str) -> bool:
    """It looks like a key of an API."""
    return re.fullmatch(r"(sk-|hf_|ghp_|gsk_|xai-)[\w-]{16,}", text.strip()) is not None


def _missing(node: Node, loc: Loc, depth: int) -> Problem:
    if isinstance(loc[depth], int):
        return Problem(node.origin, f"is {shown(node.value)}; more items are needed.")
    key = ".".join(filter(None, [node.origin.key, *map(str, loc[depth:])]))
    about = places.documented(generic(loc))
    return Problem(replace(node.origin, key=key), f"is missing: {about}." if about else "is missing.")


_MUST: Final = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "model_type": "a mapping of keys",
    "dict_type": "a mapping of keys",
    "mapping_type": "a mapping of keys",
    "dataclass_type": "a mapping of keys",
    "tuple_type": "a list",
    "list_type": "a list",
    "set_type": "a list",
    "none_required": "null",
    "finite_number": "a finite number",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge:g}",
    "less_than": "below {lt:g}",
    "less_than_equal": "at most {le:g}",
    "literal_error": "{expected}",
    "too_short": "a list of at least {min_length}",
    "too_long": "a list of at most {max_length}",
}


def _must(error: ErrorDetails) -> str:
    context = error.get("ctx", {})
    if error["type"] in ("value_error", "assertion_error"):
        return str(context.get("error", error["msg"]))
    return _MUST.get(error["type"], error["msg"]).format(**context)


def _wrong(node: Node, must: list[str], place: Place) -> str:
    value, wanted = node.value, " or ".join(must)
    about = places.documented(place)
    sentence = f"is {shown(value)}; it must be {wanted}" + (f" ({about})." if about else ".")
    return sentence + _remedy(value, wanted)


def _remedy(value: object, wanted: str) -> str:
    """The usual slip behind a value of the wrong type: a sentence after a space, or nothing."""
    if not isinstance(value, str):
        return " Quote it." if wanted == "text" and isinstance(value, (int, float)) else ""
    if "number" in wanted and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value):
        return " It is text: remove the quotes."
    if wanted == "true or false":
        word = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(value.lower())
        return f" Write {word}." if word else ""
    meant = places.close(value, re.findall(r"'([^']+)'", wanted))
    return f" Did you mean {meant}?" if meant else ""


def _unknown(node: Node, loc: Loc, guide: Guide) -> str:
    """An unknown key: what was probably meant, where it lives, or what there is."""
    within, key = loc[:-1], str(loc[-1])
    written = node.origin.key.rpartition(".")[0]
    here = guide.siblings(within)
    found = "" if isinstance(node.value, (dict, list)) else f" (set to {shown(node.value)})"
    if "." in key:
        return f"is not a key{found}. Dots are for overrides: in a file, put one mapping in another."
    return f"is not a key{found}. " + (
        _renamed(key, here, written, within, guide)
        or _elsewhere(key, here, written, within, guide)
        or _nothing(key, here, within, guide)
    )


def _here(written: str, name: str) -> str:
    return f"`{written}.{name}`" if written else f"`{name}`"


def _renamed(key: str, here: list[str], written: str, within: Loc, guide: Guide) -> str:
    """What another tool calls it."""
    ours = places.OTHERS.get(key.lower().replace("-", "_"))
    if ours is None:
        return ""
    place, _, name = ours.rpartition(".")
    if place == "method":
        return f"Here it is {_here(written, name)}." if name in here else _of_methods(name, within, guide)
    return f"Here it is {_here(written, name)}." if name in here else f"Here it is `{ours}`."


def _elsewhere(key: str, here: list[str], written: str, within: Loc, guide: Guide) -> str:
    """The key itself in another place, or a key like it in this one, whichever is surer."""
    near = places.close(key, here)
    homes = sorted(places.homes(key), key=lambda home: home.partition(".")[0] != str(next(iter(within), "")))
    if near and (places.close(key, [near], 0.8) or (not homes and not _takers(key, guide))):
        return f"Did you mean {_here(written, near)}?"
    lives = "That key lives at " + " and ".join(f"`{home}`" for home in homes[:3]) + "." if homes else ""
    taken = _of_methods(key, within, guide) if _takers(key, guide) else ""
    return taken if within in guide.used else f"{lives} {taken}".strip()


def _nothing(key: str, here: list[str], within: Loc, guide: Guide) -> str:
    everywhere = {k.name: k.dotted for k in reversed(places.every())}
    meant = places.close(key, list(everywhere), 0.75)
    if meant:
        return f"Did you mean `{everywhere[meant]}`?"
    if within in guide.used and not guide.used[within].names:
        return f"{guide.used[within].name} takes no arguments."
    return f"Keys here: {', '.join(here)}."


def _takers(name: str, guide: Guide) -> list[str]:
    return [method for method, function in guide.methods.items() if name in of(function).names]


def _of_methods(name: str, within: Loc, guide: Guide) -> str:
    """Where an argument of some method belongs."""
    takers = _takers(name, guide)
    verb = "takes" if len(takers) == 1 else "take"
    who = f"{', '.join(takers)} {verb} `{name}`" if takers else f"no method takes `{name}`"
    if within in guide.used:
        return f"{guide.used[within].name} does not take it: {who}."
    used = [taken.name for loc, taken in guide.used.items() if loc[-1] == "method" and name in taken.names]
    if used:
        return f"That is an argument of the method {used[0]}: `method.{name}`."
    return f"`{name}` is an argument of a method: {who}."
