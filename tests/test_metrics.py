"""Numbers against hand values and enumeration."""

from __future__ import annotations

import math
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from opd.metrics import (
    accuracy,
    distinct,
    histogram,
    length_only_accuracy,
    length_ratio,
    ngrams,
    overlap,
    paired_difference,
    pass_at_k,
    repetition,
    words,
)


def test_wilson_against_a_published_table() -> None:
    # R. G. Newcombe, Statistics in Medicine 17 (1998), table I, method 3
    for right, n, low, high in (
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ):
        found = accuracy([True] * right + [False] * (n - right))
        assert found.value == right / n
        assert (round(found.low, 4), round(found.high, 4)) == (low, high)
    assert accuracy([1] * 20).high == 1.0
    assert accuracy([0.5, 0.5]).value == 0.5


@given(n=st.integers(1, 40), data=st.data())
def test_wilson_is_where_the_score_test_ends(n: int, data: st.DataObject) -> None:
    """At an end p of the interval, |share - p| is exactly z standard errors computed at p."""
    right = data.draw(st.integers(0, n))
    share, low, high = accuracy([1] * right + [0] * (n - right))
    for p in (low, high):
        if 0 < p < 1:
            assert abs(share - p) == pytest.approx(1.959963985 * math.sqrt(p * (1 - p) / n), abs=1e-9)
    assert low <= share <= high


def test_no_answers_are_no_accuracy() -> None:
    with pytest.raises(ValueError, match="no answers"):
        accuracy([])


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_by_enumeration(n: int) -> None:
    for right in range(n + 1):
        for k in range(1, n + 1):
            draws = list(combinations([i < right for i in range(n)], k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-12)
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 2, 5)


def test_paired_difference_is_paired_seeded_and_covers() -> None:
    a = [0.0, 1.0] * 50
    same = paired_difference(a, [x + 0.25 for x in a])
    assert same == pytest.approx((0.25, 0.25, 0.25))  # unpaired, the spread of a would show
    b = [1.0] * 60 + [0.0] * 40
    found = paired_difference([0.0] * 100, b, seed=3)
    assert found == paired_difference([0.0] * 100, b, seed=3) != paired_difference([0.0] * 100, b, seed=4)
    half = 1.96 * math.sqrt(0.6 * 0.4 / 100)
    assert found.value == 0.6 and found.low == pytest.approx(0.6 - half, abs=0.02)
    assert found.high == pytest.approx(0.6 + half, abs=0.02)
    with pytest.raises(ValueError, match="1 and 2"):
        paired_difference([1], [1, 2])


def test_words() -> None:
    assert words("Don't stop, NOW! 3.5") == ["don", "'", "t", "stop", ",", "now", "!", "3", ".", "5"]
    assert words("我爱 GPT模型") == ["我", "爱", "gpt", "模", "型"]


def test_overlap_by_hand() -> None:
    assert overlap("the cat sat", "the cat ran") == pytest.approx(2 / 3)
    assert overlap("the cat sat", "the cat ran", 2) == pytest.approx(1 / 2)
    assert overlap("a a a b", "a b b") == pytest.approx(2 * 2 / 7)  # multiplicity: one a and one b are shared
    assert overlap("x", "x", 2) == 1.0 and overlap("x", "y", 2) == 0.0 and overlap("", "y") == 0.0


@given(a=st.text("ab c.", max_size=20), b=st.text("ab c.", max_size=20), n=st.integers(1, 3))
def test_overlap_is_symmetric_and_one_for_the_same_words(a: str, b: str, n: int) -> None:
    assert overlap(a, b, n) == overlap(b, a, n) and 0 <= overlap(a, b, n) <= 1
    assert overlap(a, a, n) == 1.0 == overlap(a, f"  {a.upper()} ", n)


def test_ngrams_distinct_and_lengths() -> None:
    assert ngrams("abab", 2) == {("a", "b"): 2, ("b", "a"): 1}
    assert distinct(["a b", "a c"]) == 3 / 4 and distinct(["a b", "a b"], 2) == 1 / 2
    assert math.isnan(distinct(["a"], 2))
    assert length_ratio([10, 30], [10, 10]) == 2.0
    with pytest.raises(ValueError, match="length ratio"):
        length_ratio([1], [0])


def test_repetition() -> None:
    assert repetition("again and " * 200) > 50
    prose = (
        "It was a bright cold day in April, and the clocks were striking thirteen; nobody there found it odd at all."
    )
    assert 0.8 < repetition(prose) < 2 and repetition("") == 1.0
    assert repetition("ab\ud83d" * 400) > 20  # half a character is no reason to stop


def test_histogram() -> None:
    edges, counts = histogram([0, 1, 2, 3, 4], bins=2)
    assert edges == (0, 2, 4) and counts == (2, 3)
    assert histogram([-5, 0.5, 9], bins=2, low=0, high=1).counts == (1, 2)
    assert sum(histogram([3, 3, 3]).counts) == 3
    with pytest.raises(ValueError, match="1 not finite"):
        histogram([1, math.nan])


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ([10] * 8, [5] * 8, 1.0),  # the longer
        ([5] * 8, [10] * 8, 1.0),  # the shorter
        ([10] * 8, [5, 15] * 4, None),  # neither, but nearer to ten
        ([7] * 8, [7] * 8, 0.5),  # length says nothing
    ],
)
def test_length_only_rules(teacher: list[int], student: list[int], expected: float | None) -> None:
    if expected is None:
        assert length_only_accuracy(teacher, [5, 5, 15, 15] * 2) == 1.0
        assert length_only_accuracy(teacher, student) == 0.0  # a rule learned on one half fails on a different one
    else:
        assert length_only_accuracy(teacher, student) == expected


@given(pairs=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=2, max_size=12))
@settings(max_examples=200)
def test_length_only_against_enumeration(pairs: list[tuple[int, int]]) -> None:
    def won(some: list[tuple[int, int]], t: float) -> float:
        if math.isinf(t):
            return sum(1.0 if a > b else 0.5 if a == b else 0.0 for a, b in some)
        return sum(1.0 if abs(a - t) < abs(b - t) else 0.5 if abs(a - t) == abs(b - t) else 0.0 for a, b in some)

    total = 0.0
    for train, test in ((pairs[::2], pairs[1::2]), (pairs[1::2], pairs[::2])):
        candidates = [math.inf, 0.0, *sorted({float(x) for pair in train for x in pair})]
        best = max(won(train, t) for t in candidates)
        total += won(test, next(t for t in candidates if won(train, t) == best))
    found = length_only_accuracy([a for a, _ in pairs], [b for _, b in pairs])
    assert found == pytest.approx(total / len(pairs))


def test_length_only_is_fair_when_length_says_nothing() -> None:
    import random

    rng = random.Random(0)
    teacher, student = ([rng.randrange(50, 200) for _ in range(4000)] for _ in range(2))
    assert abs(length_only_accuracy(teacher, student) - 0.5) < 0.03  # chosen and measured on one half it would be above
    with pytest.raises(ValueError, match="1 teacher"):
        length_only_accuracy([1], [2])
