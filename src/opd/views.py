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
from opd.method import function, is_function
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

    @property
    def looks_back(self) -> bool:
        """Whether it shows what is only known after the student spoke."""
        return self.name == "hint" or "hint" in self.fields

    @cached_property
    def _own(self) -> Callable[[Prompt, str | None], str | None] | None:
        return function(self.template, self.folder) if is_function(self.template) else None

    def of(self, prompt: Prompt, hint: str | None = None) -> Prompt | None:
        """The prompt as the judge reads it, or None where the row has no such view."""
        text = self._own(prompt, hint) if self._own else self._filled(prompt, hint)
        if text is None:
            return None
        if not isinstance(text, str):
            raise UsageError(f"views.{self.name}: `{self.template}` gave {text!r}; it returns a text, or None")
        *before, last = prompt.messages
        return replace(prompt, messages=(*before, Message(last.role, text)))

    def _filled(self, prompt: Prompt, hint: str | None) -> str | None:
        columns = {name: value for name, value in prompt.meta.items() if name != "hint"}  # a hint comes from `hint:`
        known = {name: str(value) for name, value in columns.items() if isinstance(value, str | int | float)}
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


def wrapped(wrap: str, prompts: Sequence[Prompt], path: str, folder: Path | None = None) -> list[Prompt]:
    """The prompts of a source as its `wrap` shows them, to everybody. Raises `UsageError` where one lacks a field."""
    view = View("wrap", wrap, folder)
    shown = [view.of(p) for p in prompts]
    _refuse(view, prompts, shown, path, "its `wrap`", "its `wrap`")
    return [p for p in shown if p is not None]


def shown(view: View, prompts: Sequence[Prompt], where: str) -> list[Prompt]:
    """The prompts as a judge reads them. Raises `UsageError` where rows lack what the view shows."""
    found = [view.of(p) for p in prompts]
    _refuse(view, prompts, found, where, f"the judge's view `{view.name}`", f"views.{view.name}")
    return [p for p in found if p is not None]


def _refuse(
    view: View, prompts: Sequence[Prompt], found: Sequence[Prompt | None], where: str, what: str, key: str
) -> None:
    bare = [p for p, seen in zip(prompts, found, strict=True) if seen is None]
    if bare:
        raise UsageError(
            f"{len(bare)} of {len(prompts)} prompts of {where} have nothing for {what} (the first: "
            f"{bare[0].where or bare[0].id}), which reads {', '.join(sorted(view.fields)) or view.template}: "
            f"give each row that column, or change {key}"
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
