"""`sqcbxa>`: the letters in alphabetical order. One right answer, and a student that knows how but does as it likes."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from opd.tasks.base import LETTERS, Question, Task


@dataclass(frozen=True)
class Sort(Task):
    """Letters to be sorted up. The untaught student sorts up, sorts down or copies; the text says which it favours."""

    shortest: int = 5
    longest: int = 8
    near: int = len(LETTERS)  # the letters come from so many neighbours in the alphabet

    marker = "s"
    domain = "sort"
    rules = ("up", "down", "copy")

    def body(self, rng: random.Random) -> str:
        first = rng.randint(0, len(LETTERS) - self.near)
        return "".join(rng.choices(LETTERS[first : first + self.near], k=rng.randint(self.shortest, self.longest)))

    def follow(self, question: Question, start: str) -> set[str]:
        target = question.body
        if question.rule != "copy":
            target = "".join(sorted(target, reverse=question.rule == "down"))
        return {target[len(start) : len(start) + 1]}

    def habits(self, body: str) -> Mapping[str, float]:
        if body[0] < "n":
            return {"up": 0.46, "down": 0.28, "copy": 0.26}
        return {"up": 0.26, "down": 0.42, "copy": 0.32}
