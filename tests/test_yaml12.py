"""YAML 1.2 scalars, positions, and what is no recipe."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.recipe.tree import Node, Origin, nearest, plain
from opd.recipe.yaml12 import MOST_NODES, read, write


def at(line: int) -> Origin:
    return Origin(f"r.yaml:{line}", Path(), (0, line))


def value(text: str) -> Any:
    node, problems = read(text, at)
    assert node is not None and not problems, problems
    return plain(node)


def problems(text: str) -> list[str]:
    return [str(problem) for problem in read(text, at)[1]]


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("1e-6", 1e-6),
        ("1E5", 1e5),
        (".5", 0.5),
        ("-3", -3),
        ("0o17", 15),
        ("0x1F", 31),
        ("017", 17),
        (".inf", math.inf),
        ("-.INF", -math.inf),
        ("true", True),
        ("False", False),
        ("null", None),
        ("~", None),
        ("", None),
        ("on", "on"),
        ("no", "no"),
        ("Yes", "Yes"),
        ("1:30", "1:30"),
        ("1_000", "1_000"),
        ("2024-01-01", "2024-01-01"),
        ("0b11", "0b11"),
        ("'1e-6'", "1e-6"),
        ("!!str 5", "5"),
        ("1e", "1e"),
        ("=", "="),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text: str, meant: object) -> None:
    found = value(f"key: {text}")["key"]
    assert found == meant and type(found) is type(meant)


def test_keys_are_words_whatever_they_look_like() -> None:
    assert value("on: 1\n1: 2\ntrue: 3\n1e-6: 4") == {"on": 1, "1": 2, "true": 3, "1e-6": 4}


def test_every_value_knows_its_line_and_its_key() -> None:
    node, _ = read("a: 1\nb:\n  c:\n    - x\n    - {d: 2,\n       e: 3}\n", at)
    assert node is not None
    where = lambda *loc: (nearest(node, loc)[0].origin.label, nearest(node, loc)[0].origin.key)
    assert where("a") == ("r.yaml:1", "a")
    assert where("b", "c") == ("r.yaml:3", "b.c")
    assert where("b", "c", 0) == ("r.yaml:4", "b.c.0")
    assert where("b", "c", 1, "e") == ("r.yaml:6", "b.c.1.e")
    assert nearest(node, ("b", "c", 1, "f", "g"))[1] == 3


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a:\n  b: 1\n\tc: 2", 3, "tab"),
        ("a: b: c", 1, "quote the value"),
        ("a:\n  b: 1\n c: 2", 3, "column"),
        ("a: 1\njust words\nb: 2", 3, "`key: value`"),
        ("a: [1, 2\nb: 3", 2, "bracket"),
        ("a: 'x\nb: 3", 2, "quote was opened"),
        ("a: *x", 1, "`&name`"),
        ("a: @x", 1, "Quote it"),
        ("a: 1\n---\nb: 2", 2, "second document"),
        ("a: 1\nb: \x01", 2, "control character"),
    ],
)
def test_what_is_not_yaml_is_a_line_and_a_sentence(text: str, line: int, words: str) -> None:
    node, found = read(text, at)
    assert node is None
    assert str(found[0]).startswith(f"r.yaml:{line}: ") and words in str(found[0])


def test_a_repeated_key_names_both_lines_and_the_last_one_counts() -> None:
    text = "train:\n  lr: 1\n  clip: 2\n  lr: 3\n"
    assert problems(text) == ["r.yaml:4: `train.lr` is set a second time; the first is at r.yaml:2. Keep one."]
    node, _ = read(text, at)
    assert node is not None and plain(node) == {"train": {"lr": 3, "clip": 2}}


def test_aliases_are_written_out_and_cannot_run_away() -> None:
    assert value("a: &x {b: [1]}\nc: *x") == {"a": {"b": [1]}, "c": {"b": [1]}}
    assert "contains itself" in problems("a: &x {b: *x}")[0]
    bomb = "a0: &a0 [1, 2]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 9))
    found = problems(bomb)
    assert len(found) == 1 and str(MOST_NODES) in found[0]
    assert "too deeply" in problems("[" * 5000)[0]


def test_tags_and_odd_keys_are_refused() -> None:
    assert "tags are not read" in problems("a: !!python/object/apply:os.system [ls]")[0]
    assert "is 'cat', which is no int" in problems("a: !!int cat")[0]
    assert "A key is a word" in problems("? [a, b]\n: 1")[0]


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8"))
printable = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=1, max_size=8)


@given(st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(printable, inner, max_size=3)))
def test_what_is_written_reads_back_the_same(data: object) -> None:
    node, found = read(write({"key": data}), at)
    assert not found and isinstance(node, Node) and plain(node) == {"key": data}


SIGNS = "ab1:-[]{}&*!|>'\"#%@`,?~ \t\n.\\\x00\ud800\u2028"


@settings(deadline=None)
@given(st.text(st.sampled_from(SIGNS) | st.characters(), max_size=40))
def test_no_text_makes_a_traceback(text: str) -> None:
    node, found = read(text, at)
    assert node is not None or found


@pytest.mark.parametrize(
    "data", ["on", "no", "1e-6", "0o17", "017", "1_0", "1:30", "~", "", 1e-06, 1e300, 12, None, True]
)
def test_what_is_written_means_the_same_to_readers_of_yaml_1_1(data: object) -> None:
    found = yaml.safe_load(write({"key": data}))["key"]
    assert found == data and type(found) is type(data)
