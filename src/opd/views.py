"""What a judge reads in place of the student's prompt: the same question with something the student does not see.

    same            the student's own prompt
    answer          the reference answer beside it (OPSD, RLSD)
    demonstration   a recorded response beside it (SDFT)
    context         a context that the student will have to do without (OPCD)
    hint            what the next turn gave away about the answer (hindsight)

A view is a template of the last user message with fields in braces: `{prompt}` is that message, `{answer}`,
`{response}` (the first recorded one), `{hint}`, or any other column of the data, such as `{context}`. A row that lacks
a field has no such view, and its judge is not heard there. `./file.py:function` makes the text itself, from (prompt,
hint), and None where there is none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from opd.errors import UsageError
from opd.method import function
from opd.types import Message, Prompt, Rollout, Turn

SAME = "same"
_FIELD = re.compile(r"\{([a-z_][a-z0-9_]*)\}")


@dataclass(frozen=True)
class View:
    """A view by name. Raises `UsageError` for a file without the function that it names."""

    name: str
    template: str
    folder: Path | None = None  # what ./file.py is relative to

    @property
    def fields(self) -> frozenset[str]:
        """The fields that a row must have."""
        return frozenset() if self._own else frozenset(_FIELD.findall(self.template)) - {"prompt"}

    @cached_property
    def _own(self) -> Callable[[Prompt, str | None], str | None] | None:
        return function(self.template, self.folder) if ".py:" in self.template else None

    def of(self, prompt: Prompt, hint: str | None = None) -> Prompt | None:
        """The prompt as the judge reads it, or None where the row has no such view."""
        text = self._own(prompt, hint) if self._own else self._filled(prompt, hint)
        if text is None:
            return None
        *before, last = prompt.messages
        return replace(prompt, messages=(*before, Message(last.role, text)))

    def _filled(self, prompt: Prompt, hint: str | None) -> str | None:
        known = {name: value for name, value in prompt.meta.items() if isinstance(value, str)}
        known["prompt"] = prompt.messages[-1].content
        if (answer := prompt.answer or next(iter(prompt.responses), None)) is not None:
            known["answer"] = answer
        if prompt.responses:
            known["response"] = prompt.responses[0]
        if hint is not None:
            known["hint"] = hint
        if not self.fields <= known.keys():
            return None
        return _FIELD.sub(lambda m: known[m[1]], self.template)  # in one pass: what is filled in is not read again


def wrapped(view: View, prompts: Sequence[Prompt]) -> list[Prompt]:
    """The prompts as a view shows them, for everybody. Raises `UsageError` where one lacks a field."""
    refuse_missing(view, list(prompts), "the data")
    return [view.of(p) or p for p in prompts]


def refuse_missing(view: View, prompts: list[Prompt], where: str) -> None:
    """Raise `UsageError` where rows lack what a view shows. A hint is only known after the student spoke."""
    if "hint" in view.fields:
        return
    bare = [p for p in prompts if view.of(p) is None]
    if bare:
        raise UsageError(
            f"{len(bare)} of {len(prompts)} prompts of {where} have nothing for the judge's view `{view.name}` (the "
            f"first: {bare[0].where or bare[0].id}), which reads {', '.join(sorted(view.fields)) or view.template}: "
            f"give each row that column, or change views.{view.name}"
        )


def reread(rollout: Rollout, context: tuple[int, ...]) -> Rollout:
    """The same answer, token by token, after another prompt."""
    start, n = rollout.turns[0].start, len(context)
    given = (False,) * n
    return replace(
        rollout,
        tokens=(*context, *rollout.tokens[start:]),
        mask=given + rollout.mask[start:],
        behaviour=(float("nan"),) * n + rollout.behaviour[start:],
        version=(-1,) * n + rollout.version[start:],
        turns=tuple(Turn(t.start - start + n, t.end - start + n, t.finish) for t in rollout.turns),
    )
