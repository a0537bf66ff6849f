"""`g3k7a2b>`: the digits first, then the letters, any order within a kind, each once; 3! 4! = 144 answers are right."""

from __future__ import annotations

import random
from dataclasses import dataclass

from opd.tasks.base import DIGITS, END, LETTERS, Question, Task


@dataclass(frozen=True)
class Group(Task):
    """Digits and letters to be told apart and repeated. The untaught student goes by the rule, but loses count.

    `counts` are the pairs of how many digits and how many letters a question may have.
    """

    counts: tuple[tuple[int, int], ...] = ((2, 3), (2, 4), (2, 5), (3, 3), (3, 4), (4, 3), (4, 4))

    marker = "g"
    domain = "group"
    rules = ("digits", "letters")  # what comes first

    def body(self, rng: random.Random) -> str:
        digits, letters = rng.choice(self.counts)
        items = rng.sample(DIGITS, digits) + rng.sample(LETTERS, letters)
        rng.shuffle(items)
        return "".join(items)

    def follow(self, question: Question, start: str) -> set[str]:
        left = [c for c in question.body if c not in start]
        first = [c for c in left if c.isdigit() == (question.rule != "letters")]
        return set(first or left) or {END}
