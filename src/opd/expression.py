"""Expressions: numbers per token that never carry gradient. Credits, anchors and gates are all of this type.

Here is what they share; each door has its own file: `opd.credits`, `opd.anchors`, `opd.gates`.

Evaluation sees one of two scopes with the same names: a *tile* (some tokens, with the vocabulary axis) or the *whole*
optimizer batch (all tokens, without it). An expression whose reach is wider than a token is evaluated once a step on
the whole batch, before it is cut, and the tile reads the result: so neither micro-batches nor tiles can change it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from opd.schedule import Coefficient, Schedule, value
from opd.types import Judge, Needs, Says

if TYPE_CHECKING:
    from torch import Tensor

    from opd.aligned import Alignment


class Reach(IntEnum):
    """How much of the batch one value of an expression depends on."""

    TOKEN = 0
    SEQUENCE = 1
    GROUP = 2
    BATCH = 3


class Scope(Protocol):
    """What an expression may read. N: loss tokens in sight; log-probabilities are of the sampling distribution."""

    @property
    def live(self) -> Tensor:
        """[N] the student now."""

    @property
    def old(self) -> Tensor:
        """[N] the student in the trainer, just before the first update on this batch."""

    @property
    def behaviour(self) -> Tensor:
        """[N] the engine that spoke."""

    @property
    def step(self) -> int:
        """The step of the stage, for scheduled factors."""

    def judged(self, judge: Judge) -> Tensor:
        """[N] the judge's log-probability of the sampled token."""

    def heard(self, judge: Judge) -> Tensor:
        """[N] 1 where the judge had something to look at, 0 where its view does not exist."""

    def column(self, expression: Expression) -> Tensor:
        """[N] a wide expression, already evaluated."""


class Whole(Scope, Protocol):
    """The scope of a whole optimizer batch. B: rows."""

    @property
    def row(self) -> Tensor:
        """[N] the row of each token."""

    @property
    def group(self) -> Tensor:
        """[B] rows of one prompt and one speaker share a number."""

    @property
    def reward(self) -> Tensor:
        """[B] the task's."""

    @property
    def finished(self) -> Tensor:
        """[B] whether each row ended by itself, and was not cut at its longest length."""

    @property
    def prompt(self) -> Tensor:
        """[B] rows of one prompt share a number, whoever spoke them."""

    def scored(self, judge: Judge) -> Tensor:
        """[K, B] what each of the critics gave each row."""

    def spoken_by(self, speaker: str) -> Tensor:
        """[B] whether this speaker spoke the row."""

    def total(self, x: Tensor) -> Tensor:
        """A sum over all ranks. Every rank asks for the same sums in the same order."""

    def alignment(self, judge: Judge) -> Alignment:
        """How the tokens of a judge with another tokenizer meet the student's."""


@dataclass(frozen=True)
class Expression:
    """A number per token. Subclasses say `at(scope)`, and what they need and read if anything."""

    reach: ClassVar[Reach] = Reach.TOKEN
    parts: ClassVar[tuple[str, ...]] = ()  # names of fields that are expressions

    def at(self, scope: Any) -> Tensor:
        raise NotImplementedError(f"{type(self).__name__} does not say what it is")

    def counted(self, scope: Any) -> Tensor | None:
        """[N] in the whole batch, on which tokens it has a value at all; None: on all."""
        return None

    def value(self, scope: Scope) -> Tensor:
        """[N] under any scope; what reaches wider than a token is read from the batch's column."""
        return scope.column(self) if self.reach > Reach.TOKEN else self.at(scope)

    def log_ratio(self, live_N: Tensor, scope: Scope) -> Tensor:
        """[N] log of the student over this number, as a push's anchor; gradient through `live_N` alone."""
        return live_N - self.value(scope).detach()

    def measures(self, scope: Any) -> Mapping[str, Tensor]:
        """For the record: values by name, of which the batch's mean is told. Only wide expressions are asked."""
        return {}

    @property
    def children(self) -> tuple[Expression, ...]:
        return tuple(getattr(self, name) for name in self.parts)

    @property
    def own_needs(self) -> Needs:
        return {}

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset()

    @property
    def needs(self) -> Needs:
        return union([self.own_needs, *(c.needs for c in self.children)])

    @property
    def reads(self) -> frozenset[str]:
        return self.own_reads.union(*(c.reads for c in self.children))

    def every(self) -> Iterable[Expression]:
        """Itself and all that it is made of."""
        yield self
        for child in self.children:
            yield from child.every()

    def wide(self) -> Iterable[Expression]:
        """The outermost parts that must be evaluated on the whole batch."""
        if self.reach > Reach.TOKEN:
            yield self
        else:
            for child in self.children:
                yield from child.wide()

    def __add__(self, other: Expression) -> Expression:
        return self if isinstance(other, Zero) else Sum(self, other)

    def where(self, gate: Expression) -> Expression:
        """The expression times a gate, and exactly 0 where the gate is 0, whatever it would be there."""
        return self if isinstance(self, Zero) else Gated(gate, self)

    def __rmul__(self, factor: Coefficient) -> Expression:
        """Scale; a factor of 0 removes the expression and with it what it would have asked."""
        return Zero() if factor == 0 else Scaled(factor, self)


@dataclass(frozen=True)
class Zero(Expression):
    """Nothing: asks nobody, reads nothing, vanishes in a sum."""

    def at(self, scope: Scope) -> Tensor:
        return scope.behaviour.new_zeros(scope.behaviour.shape)

    def __add__(self, other: Expression) -> Expression:
        return other

    def __str__(self) -> str:
        return "0"


@dataclass(frozen=True)
class Sum(Expression):
    """left + right."""

    left: Expression
    right: Expression
    parts = ("left", "right")

    def at(self, scope: Scope) -> Tensor:
        return self.left.value(scope) + self.right.value(scope)

    def __str__(self) -> str:
        return f"{self.left} + {self.right}"


@dataclass(frozen=True)
class Scaled(Expression):
    """factor * inner."""

    factor: Coefficient
    inner: Expression
    parts = ("inner",)

    def at(self, scope: Scope) -> Tensor:
        return value(self.factor, scope.step) * self.inner.value(scope)

    def __str__(self) -> str:
        factor = str(self.factor) if isinstance(self.factor, Schedule) else f"{self.factor:g}"
        return f"{factor} ({self.inner})"


@dataclass(frozen=True)
class Gated(Expression):
    """gate * inner, and 0 where the gate is 0 even if inner is not a number there."""

    gate: Expression
    inner: Expression
    parts = ("gate", "inner")

    def at(self, scope: Scope) -> Tensor:
        gate_N = self.gate.value(scope)
        return gate_N * self.inner.value(scope).masked_fill(gate_N == 0, 0.0)

    def __str__(self) -> str:
        return f"{self.gate} ({self.inner})"


def union(many: Iterable[Needs]) -> dict[Judge, Says]:
    """For each judge the most that anyone asks."""
    out: dict[Judge, Says] = {}
    for needs in many:
        for judge, says in needs.items():
            out[judge] = max(says, out.get(judge, Says.TEXT))
    return out
