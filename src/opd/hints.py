"""Hindsight: what followed an answer, turned into a hint that only the judge will see (OpenClaw-RL).

The rule says what the next turn was, or the hint itself; a judge, if there is one, reads the next turn and either draws
a hint from it or finds none. A judge's hints of ten characters or fewer say too little and are dropped, and of several
the longest counts, as in the paper's code; a rule's own text is taken as it is.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from opd.errors import UsageError
from opd.method import function, is_function
from opd.types import Message, Prompt, Rollout

Next = Callable[[str, str], str | None]  # (prompt, answer) to what came next, or None where nothing can be learned
SHORTEST = 10
HINT = re.compile(r"\[HINT_START\](.*?)\[HINT_END\]", re.DOTALL)
ASK = (
    "A user asked an assistant something, and what came next shows how good the reply was.\n\n"
    "Asked:\n{prompt}\n\nReply:\n{answer}\n\nWhat came next:\n{next}\n\n"
    "If what came next shows how the reply should have been different, write what would have helped, in one to three "
    "sentences, between [HINT_START] and [HINT_END]. If it shows nothing of the kind, write NONE."
)


def rule(use: str, folder: Path | None = None) -> Next:
    """`world`, the hint of the built-in world's tasks, or `./file.py:name`. Raises `UsageError` for another name."""
    if use == "world":
        return _of_world
    if is_function(use):
        return function(use, folder)
    raise UsageError(f"hint.use is `{use}`: it is `world`, or your own function as ./file.py:name")


def _of_world(prompt: str, answer: str) -> str | None:
    from opd.tasks import task_of

    return task_of(prompt).hint(prompt, answer)


def question(rollout: Rollout, came_next: str) -> Prompt:
    """What the judge is asked about a rollout."""
    fields = {"prompt": rollout.prompt.text, "answer": rollout.text, "next": came_next}
    text = re.sub(r"\{(\w+)\}", lambda m: fields[m[1]], ASK)  # in one pass: what is filled in is not read again
    return Prompt((Message("user", text),), domain=rollout.prompt.domain)


def drawn(replies: Sequence[str]) -> str | None:
    """The longest hint in a judge's replies, or None."""
    found = [m[1].strip() for reply in replies for m in HINT.finditer(reply)]
    return max((hint for hint in found if len(hint) > SHORTEST), key=len, default=None)


def with_hints(
    rollouts: Sequence[Rollout], came_next: Next, judge: Callable[[Sequence[Prompt]], Sequence[Sequence[str]]] | None
) -> list[Rollout]:
    """The student's rollouts with hints. `judge` answers prompts, some times each; else the rule's text is it."""
    follows = {i: came_next(r.prompt.text, r.text) for i, r in enumerate(rollouts) if r.speaker == "student"}
    told = {i: text for i, text in follows.items() if text}
    if judge is not None and told:
        replies = judge([question(rollouts[i], text) for i, text in told.items()])
        told = {i: hint for i, each in zip(told, replies, strict=True) if (hint := drawn(each))}
    return [replace(r, hint=told.get(i)) for i, r in enumerate(rollouts)]
