"""The tasks of the built-in world: questions with exact verifiers, in disjoint train, dev and test splits. No torch.

    group    g3k7a2b> -> 372kgab       many right answers: what a distribution shows and a single text hides
    sort     sqcbxa>  -> abcqx         one right answer; the student sorts up, down or copies, by habit
    record   rkqab,472> -> [kqab:472]  one right style; the student can write it, and writes others too

Held out, the same rules on questions that training never shows: `group-new` has another count of digits and letters,
`sort-near` letters that are neighbours in the alphabet, `record-long` longer words.
"""

from __future__ import annotations

import hashlib
import random
from difflib import get_close_matches
from typing import Literal, get_args

from opd.errors import UsageError
from opd.tasks.base import ALPHABET, Question, Task
from opd.tasks.group import Group
from opd.tasks.record import Record
from opd.tasks.sort import Sort
from opd.types import Message, Prompt

__all__ = [
    "ALPHABET",
    "DOMAINS",
    "TASKS",
    "Question",
    "Split",
    "Task",
    "check",
    "prompts",
    "split_of",
    "task",
    "task_of",
]

Split = Literal["train", "dev", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES = 8  # dev and test get one share each of all possible prompts, train the rest

TASKS: dict[str, Task] = {
    t.name: t
    for t in (
        Group("group"),
        Sort("sort"),
        Record("record"),
        Group("group-new", counts=((3, 5),)),
        Sort("sort-near", near=8),
        Record("record-long", shortest_word=6, longest_word=6),
    )
}
DOMAINS: tuple[str, ...] = tuple(dict.fromkeys(t.domain for t in TASKS.values()))


def task(name: str) -> Task:
    """The task of that name. Raises `UsageError` with the nearest name when there is none."""
    if name in TASKS:
        return TASKS[name]
    near = get_close_matches(name, TASKS, n=1)
    raise UsageError(
        f"'{name}' is not a task of the built-in world"
        + (f"; '{near[0]}' is." if near else ".")
        + f" All: {', '.join(TASKS)}."
    )


def task_of(prompt: str) -> Task:
    """The task that a prompt belongs to, told by its marker. Raises `UsageError` when no task's marker fits."""
    marker = prompt.split(";")[-1][:1]
    for known in TASKS.values():
        if known.marker == marker:
            return known
    markers = ", ".join(f"'{TASKS[d].marker}' ({d})" for d in DOMAINS)
    raise UsageError(f"'{prompt}' belongs to no task of the built-in world: markers are {markers}.")


def check(prompt: str, text: str) -> bool:
    """Whether `text` is a right answer to `prompt`, whichever task that belongs to."""
    return task_of(prompt).check(prompt, text)


def split_of(prompt: str) -> Split:
    """The split that a bare prompt belongs to, by a hash of its text: the same in every process and for every seed."""
    share = hashlib.blake2b(prompt.encode(), digest_size=8).digest()[0] % SHARES
    return "dev" if share == 0 else "test" if share == 1 else "train"


def prompts(name: str, n: int, seed: int = 0, split: Split = "train") -> tuple[Prompt, ...]:
    """`n` distinct prompts of one split of a task, each with a right answer. Fewer are the first of more.

    Raises `UsageError` for an unknown task or split.
    """
    chosen = task(name)
    if split not in SPLITS:
        raise UsageError(f"'{split}' is not a split of the built-in world; {', '.join(SPLITS)} are.")
    rng = random.Random(f"{name} {split} {seed}")
    found: dict[str, str] = {}
    while len(found) < n:
        text = chosen.prompt(rng)
        if text not in found and split_of(text) == split:
            found[text] = chosen.answer(text, rng)
    return tuple(
        Prompt((Message("user", text),), answer=answer, domain=chosen.domain, meta={"context": chosen.rules[0]})
        for text, answer in found.items()
    )
