"""What every task of the built-in world is made of: a text in, the characters that may come next, a verifier.

A prompt is one line, `[rule;][=start;]<marker><body>>`:

    sqcbxa>            the bare question; the marker `s` names the domain
    down;sqcbxa>       a rule in front says how to answer (context distillation)
    =abcqx;sqcbxa>     the answer, or its first characters, in front (privileged views, hindsight)

A task says one thing: which characters may follow a given start of an answer. Answers, the verifier and hints all
follow from that, so they cannot disagree.
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from opd.errors import UsageError

DIGITS = "0123456789"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
ALPHABET = DIGITS + LETTERS + "\n +-*/=:;,.<>()[]|#!?_"  # every character that the world's tokenizers know
END = ""  # among the characters that may follow: the answer may end here


@dataclass(frozen=True, slots=True)
class Question:
    """A prompt taken apart: the body, the rule in front of it ("" for none), the start of an answer in front of it."""

    body: str
    rule: str = ""
    start: str = ""


@dataclass(frozen=True)
class Task(ABC):
    """One kind of question with an exact verifier. Subclasses give `body` and `follow`."""

    name: str
    marker: ClassVar[str]
    domain: ClassVar[str]
    rules: ClassVar[tuple[str, ...]]  # what a rule may say; the first is what a bare prompt asks for

    @abstractmethod
    def body(self, rng: random.Random) -> str:
        """A random question, without marker and `>`."""

    @abstractmethod
    def follow(self, question: Question, start: str) -> set[str]:
        """The characters that keep `start` the start of a right answer; `END` among them if it is one already."""

    def habits(self, body: str) -> Mapping[str, float]:
        """How the untaught student answers a bare prompt: a probability for each rule it acts by."""
        return {self.rules[0]: 1.0}

    def prompt(self, rng: random.Random) -> str:
        """A random bare prompt."""
        return f"{self.marker}{self.body(rng)}>"

    def parse(self, prompt: str) -> Question:
        """Take a prompt apart. Raises `UsageError` when it is none of this task's."""
        *context, bare = prompt.split(";")
        rules = [c for c in context if not c.startswith("=")]
        starts = [c[1:] for c in context if c.startswith("=")]
        fits = bare.startswith(self.marker) and bare.endswith(">") and len(rules) < 2 and len(starts) < 2
        if not fits or any(rule not in self.rules for rule in rules):
            raise UsageError(
                f"'{prompt}' is not a prompt of the task '{self.name}': it must read [rule;][=start;]{self.marker}...> "
                f"with a rule among {', '.join(self.rules)}."
            )
        return Question(bare[1:-1], "".join(rules), "".join(starts))

    def answer(self, prompt: str, rng: random.Random) -> str:
        """One right answer, random among the right ones; it begins with the start that the prompt gives, if it can."""
        question = self.parse(prompt)
        text = question.start if self.right_start(question, question.start) == question.start else ""
        while (char := rng.choice(sorted(self.follow(question, text)))) != END:
            text += char
        return text

    def check(self, prompt: str, text: str) -> bool:
        """Whether `text` answers `prompt`, under the prompt's own rule. What was given in front proves nothing."""
        question = self.parse(prompt)
        return self.right_start(question, text) == text and END in self.follow(question, text)

    def right_start(self, question: Question, text: str) -> str:
        """The longest start of `text` that some right answer has too."""
        for i, char in enumerate(text):
            if char not in self.follow(question, text[:i]):
                return text[:i]
        return text

    def hint(self, prompt: str, text: str) -> str | None:
        """How a wrong answer should have begun: its right start and one right character more. None if it is right."""
        if self.check(prompt, text):
            return None
        question = self.parse(prompt)
        start = self.right_start(question, text)
        return start + min(self.follow(question, start) - {END}, default=END)

    def with_rule(self, prompt: str, rule: str | None = None) -> str:
        """The prompt with a rule in front; by default the rule that says what a bare prompt means."""
        return f"{self.rules[0] if rule is None else rule};{prompt}"

    def with_start(self, prompt: str, start: str) -> str:
        """The prompt with an answer (a privileged view), or the start of one (a hint), in front."""
        return f"={start};{prompt}"

    def habit(self, prompt: str, rng: random.Random) -> str:
        """What the untaught student says: by the prompt's rule where it has one, else by one of its habits."""
        question = self.parse(prompt)
        if question.rule:
            return self.answer(prompt, rng)
        habits = self.habits(question.body)
        rule = rng.choices(list(habits), list(habits.values()))[0]
        return self.answer(self.with_rule(prompt, rule), rng)
