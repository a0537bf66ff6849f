"""The JSON schema of a recipe's YAML, for editors: completion, hover texts, red underlines while typing.

It describes what a user may write, so the shorthands are in it, and a branch for each method and reward.
The loader is stricter (it looks at files and at keys together); it never refuses for its form what the schema allows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from opd.recipe.arguments import Catalogue, of
from opd.recipe.sections import Recipe

_OWN_FILE: Final = r"\.py:\w+$"
_SCHEDULE: Final = {
    "type": "string",
    "pattern": r"^(linear|cosine)\(.*\)$",
    "description": "a number that changes with the step of the stage: linear(start, end, steps)",
}


def schema(methods: Catalogue, rewards: Catalogue) -> dict[str, Any]:
    """The schema (JSON Schema 2020-12) with these methods and rewards."""
    whole = Recipe.model_json_schema()
    defs: dict[str, Any] = whole["$defs"]
    defs["Method"] = _function("name", methods, {}, defs)
    weight = {"weight": defs["Reward"]["properties"]["weight"]}
    defs["Reward"] = _function("use", rewards, weight, defs)
    properties: dict[str, Any] = whole["properties"]
    for name in ("train", "dev"):
        _one_or_many(defs["Data"]["properties"][name], {"$ref": "#/$defs/Source"}, {"type": "string"})
    _one_or_many(properties["reward"], {"$ref": "#/$defs/Reward"}, {"type": "null"})
    properties["method"] = {"$ref": "#/$defs/Method", "description": "the objective of a recipe without stages"}
    whole["required"] = [name for name in whole["required"] if name != "stages"]
    whole["oneOf"] = [{"required": ["stages"]}, {"required": ["method"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **_untitled(whole), "title": "opd recipe"}


def _untitled(schema: Any) -> Any:
    """Without the titles that pydantic makes from names: editors show the name already."""
    if isinstance(schema, dict):
        return {k: _untitled(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
    return [_untitled(entry) for entry in schema] if isinstance(schema, list) else schema


def _one_or_many(field: dict[str, Any], item: dict[str, Any], short: dict[str, Any]) -> None:
    """Change a list's schema in place: one item without brackets, or the short form, will do."""
    many = {key: field.pop(key) for key in ("type", "items", "minItems") if key in field}
    several = {"anyOf": [item, short]} if short != {"type": "null"} else item
    field["anyOf"] = [item, short, many | {"items": several}]


def _function(key: str, functions: Catalogue, more: dict[str, Any], defs: dict[str, Any]) -> dict[str, Any]:
    """A name alone, or a mapping with the arguments of that name; a function of the user's may take anything."""
    own = {"type": "string", "pattern": _OWN_FILE, "description": "your own: ./file.py:name"}
    word = {"type": "string", "enum": sorted(functions)}
    branches = [_branch(key, name, function, more, defs) for name, function in functions.items()]
    free = {"type": "object", "properties": {key: own, **more}, "required": [key]}
    return {"anyOf": [word, own, *branches, free]}


def _branch(
    key: str, name: str, function: Callable[..., Any], more: dict[str, Any], defs: dict[str, Any]
) -> dict[str, Any]:
    found = of(function).model.model_json_schema()
    for title, definition in found.get("$defs", {}).items():
        defs[title] = _SCHEDULE if title == "Schedule" else definition
    return {
        "type": "object",
        "description": of(function).about,
        "properties": {key: {"const": name}, **more, **found.get("properties", {})},
        "required": [key, *found.get("required", [])],
        "additionalProperties": False,
    }
