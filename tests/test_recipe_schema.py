"""The JSON schema for editors says what the loader says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml

from opd.errors import UsageError
from opd.method import catalogue
from opd.recipe import arguments, build, dump, schema
from opd.rewards import KINDS

SCHEMA = schema()
TYPES = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}


def fits(value: Any, rule: Any) -> bool:
    """JSON Schema 2020-12, as far as the schema uses it; an unknown word in a rule is an error of the test."""
    if "$ref" in rule:
        return fits(value, SCHEMA["$defs"][rule["$ref"].removeprefix("#/$defs/")])
    silent = {"description", "default", "title", "$schema", "$defs"}
    return all(check(value, word, rule[word], rule) for word in rule if word not in silent)


def check(value: Any, word: str, wanted: Any, rule: Any) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match word:
        case "type" if wanted == "integer":
            return isinstance(value, int) and not isinstance(value, bool)
        case "type":
            return number if wanted == "number" else isinstance(value, TYPES[wanted])
        case "enum":
            return value in wanted
        case "const":
            return bool(value == wanted)
        case "pattern":
            return not isinstance(value, str) or re.search(wanted, value) is not None
        case "anyOf":
            return any(fits(value, each) for each in wanted)
        case "oneOf":
            return sum(fits(value, each) for each in wanted) == 1
        case "required":
            return not isinstance(value, dict) or set(wanted) <= set(value)
        case "properties":
            return not isinstance(value, dict) or all(fits(value[k], r) for k, r in wanted.items() if k in value)
        case "additionalProperties" if isinstance(value, dict):
            rest = {k: v for k, v in value.items() if k not in rule.get("properties", {})}
            return not rest if wanted is False else wanted is True or all(fits(v, wanted) for v in rest.values())
        case "items":
            return not isinstance(value, list) or all(fits(entry, wanted) for entry in value)
        case "prefixItems":
            return not isinstance(value, list) or all(map(fits, value, wanted))
        case "minItems" | "maxItems":
            return not isinstance(value, list) or (len(value) >= wanted if word == "minItems" else len(value) <= wanted)
        case "minimum":
            return not number or value >= wanted
        case "maximum":
            return not number or value <= wanted
        case "exclusiveMinimum":
            return not number or value > wanted
        case "additionalProperties" | "maxLength":
            return True
    raise AssertionError(f"the schema uses {word}, which this test does not know")


def change(data: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    first, _, rest = key.partition(".")
    return {**data, first: change(data.get(first, {}), rest, value) if rest else value}


BASE: dict[str, Any] = {
    "student": {"model": "m/m"},
    "teachers": {"teacher": {"model": "t/t"}},
    "data": {"train": "world:sort"},
    "method": {"name": "gkd", "beta": 0.5},
    "train": {"steps": 3},
}
GOOD = {
    "method": ["gkd", {"name": "gad", "group": 4, "kl": "linear(0.1, 0, 20)"}, {"name": "gad", "clip": None}],
    "data.train": [["a/b", {"path": "a/b", "weight": 2}], {"path": "a/b", "domain": "x"}],
    "reward": [None, "exact_match", {"use": "regex", "pattern": "x", "weight": -1}, ["task", {"use": "task"}]],
    "student.lora": [8, None],
    "train.lr": [1e-6, 1],
    "eval.length_band": [[0.8, 1.2], None],
    "train.betas": [[0.9, 0.95]],
}
BAD = {
    "method": [{"name": "gad", "grp": 4}, "gkdd", {"group": 4}, {"name": "gkd", "beta": 2}, {"name": "gad", "kl": "x"}],
    "data.train": [[], {"pth": "a/b"}, 3, {"path": "a/b", "weight": 0}],
    "reward": ["exact", {"use": "regex", "weight": 1}, {"use": "task", "wieght": 1}],
    "student.lora": [1.5, "8", True, 0],
    "student.modle": ["x"],
    "train.lr": ["1e-6", 0, -1],
    "train.betas": [[0.9], [0.9, 0.9, 0.9], [0.9, 2]],
    "speak.engine": ["vlm"],
    "stages": [[{"method": "gkd", "steps": 1}]],  # besides `method`
}


def cases(table: dict[str, list[Any]]) -> list[Any]:
    return [pytest.param(key, value, id=f"{key}={value}") for key, values in table.items() for value in values]


@pytest.mark.parametrize(("key", "value"), cases(GOOD))
def test_what_may_be_written_fits_the_schema_and_loads(key: str, value: Any) -> None:
    data = change(BASE, key, value)
    assert fits(data, SCHEMA)
    text = dump(build(data, look=False))
    assert fits(yaml.safe_load(text), SCHEMA)


@pytest.mark.parametrize(("key", "value"), cases(BAD))
def test_what_may_not_fits_neither(key: str, value: Any) -> None:
    data = change(BASE, key, value)
    assert not fits(data, SCHEMA)
    with pytest.raises(UsageError):
        build(data, look=False)


def test_every_method_and_reward_has_a_branch_with_its_arguments_and_first_line() -> None:
    for name, key, functions in (("Method", "name", catalogue()), ("Reward", "use", KINDS)):
        found = {b["properties"][key].get("const"): b for b in SCHEMA["$defs"][name]["anyOf"] if "properties" in b}
        assert set(functions) == set(found) - {None}
        for use, function in functions.items():
            assert found[use]["description"] == arguments.of(function).about != ""
            assert set(arguments.of(function).names) == set(found[use]["properties"]) - {key, "weight"}


def test_every_key_has_a_hover_text() -> None:
    bare = []
    for section, rule in SCHEMA["$defs"].items():
        if section not in ("Method", "Reward", "Schedule"):
            bare += [f"{section}.{key}" for key, entry in rule["properties"].items() if not entry.get("description")]
    assert bare == [] and json.loads(json.dumps(SCHEMA)) == SCHEMA
