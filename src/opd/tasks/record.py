"""`rkqab,472>`: the word and the number in one fixed style, `[kqab:472]`. The student can, and writes in others too."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

from opd.tasks.base import DIGITS, LETTERS, Question, Task

BRACKETS = {"[": 0.55, "(": 0.45}  # how often the untaught student opens with it, over all words
JOINTS = {":": 0.75, "-": 0.15, "=": 0.1}
WORD_FIRST = 0.8


def style(bracket: str, joint: str, word_first: bool) -> str:
    """A style as a rule says it: how the word `a` and the number `1` would be written."""
    inside = f"a{joint}1" if word_first else f"1{joint}a"
    return f"{bracket}{inside}{']' if bracket == '[' else ')'}"


@dataclass(frozen=True)
class Record(Task):
    """A word and a number to be written as a record. The untaught student mixes brackets, joints and order."""

    shortest_word: int = 3
    longest_word: int = 5

    marker = "r"
    domain = "record"
    rules = tuple(style(*choice) for choice in product(BRACKETS, JOINTS, (True, False)))

    def body(self, rng: random.Random) -> str:
        word = rng.choices(LETTERS, k=rng.randint(self.shortest_word, self.longest_word))
        number = rng.choices(DIGITS, k=rng.randint(2, 3))
        return f"{''.join(word)},{''.join(number)}"

    def follow(self, question: Question, start: str) -> set[str]:
        word, number = question.body.split(",")
        fields = {"a": word, "1": number}
        target = "".join(fields.get(c, c) for c in question.rule or self.rules[0])
        return {target[len(start) : len(start) + 1]}

    def habits(self, body: str) -> Mapping[str, float]:
        tilt = {"[": 0.15, "(": -0.15} if body[0] < "n" else {"[": -0.15, "(": 0.15}
        return {
            style(b, j, first): (BRACKETS[b] + tilt[b]) * JOINTS[j] * (WORD_FIRST if first else 1 - WORD_FIRST)
            for b, j, first in product(BRACKETS, JOINTS, (True, False))
        }
