"""Credits: how good a sampled token was. `push` raises the token by its credit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd import math
from opd.anchors import Against, Logp
from opd.expression import Expression, Reach, Scope, Whole
from opd.types import RETOKENIZED, Judge, Needs, Says

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LogRatio(Expression):
    """log judge - log student on the sampled token, in nats."""

    judge: Judge
    against: Against

    def at(self, scope: Scope) -> Tensor:
        mine: Tensor = getattr(scope, self.against)
        return scope.judged(self.judge) - mine.detach()

    @property
    def own_needs(self) -> Needs:
        return {self.judge: Says.TOKEN}

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({self.against})

    def __str__(self) -> str:
        return f"log {self.judge} - {Logp(self.against)}"


@dataclass(frozen=True)
class SpanRatio(Expression):
    """log judge - log student of the whole span of text that a token stands in, for a judge with another tokenizer."""

    judge: Judge
    against: Against
    reach = Reach.SEQUENCE

    def at(self, scope: Whole) -> Tensor:
        mine: Tensor = getattr(scope, self.against)
        return math.align.totals(scope.judged(self.judge) - mine.detach(), scope.alignment(self.judge).span_N)

    def counted(self, scope: Whole) -> Tensor:
        return scope.alignment(self.judge).inside_N

    @property
    def own_needs(self) -> Needs:
        return {self.judge: Says.TOKEN}

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({self.against})

    def __str__(self) -> str:
        return f"Σ_span (log {self.judge} - {Logp(self.against)})"


@dataclass(frozen=True)
class Reward(Expression):
    """A rollout's reward (the task's, or a critic's score) less its group's mean, over the deviation if `std`."""

    judge: Judge | None = None
    std: bool = False
    min_std: float = 0.0
    reach = Reach.GROUP

    def at(self, scope: Whole) -> Tensor:
        value_B = scope.reward if self.judge is None else scope.scored(self.judge)
        advantage_B = math.credit.group_advantage(value_B, scope.group, std=self.std, min_std=self.min_std)
        return advantage_B[scope.row]

    @property
    def own_needs(self) -> Needs:
        return {} if self.judge is None else {self.judge: Says.SCORE}

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"reward"}) if self.judge is None else frozenset()

    def __str__(self) -> str:
        name = "reward" if self.judge is None else f"score_{self.judge}"
        return f"({name} - group mean)" + (" / group std" if self.std else "")


@dataclass(frozen=True)
class Outcome(Expression):
    """A rollout's reward as it is, for every token of it: no group, no baseline."""

    reach = Reach.SEQUENCE

    def at(self, scope: Whole) -> Tensor:
        return scope.reward[scope.row]

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"reward"})

    def __str__(self) -> str:
        return "reward"


@dataclass(frozen=True)
class Discounted(Expression):
    """sum_k gamma^k credit_{t+k}, the token itself included."""

    inner: Expression
    gamma: float
    parts = ("inner",)
    reach = Reach.SEQUENCE

    def at(self, scope: Whole) -> Tensor:
        return math.credit.discounted(self.inner.value(scope), scope.row, self.gamma)

    def __str__(self) -> str:
        return f"Σ_k {self.gamma:g}^k ({self.inner})_t+k"


def log_ratio(judge: Judge, against: Against = "live") -> Expression:
    """log judge - log student on the sampled token; needs TOKEN. Pushed on-policy it has the reverse KL's gradient.

    Of a judge that reads the text retokenized: of the span of text that the token stands in, by the chain rule.
    """
    return SpanRatio(judge, against) if judge.view == RETOKENIZED else LogRatio(judge, against)


def reward(judge: Judge | None = None, *, std: bool = False, min_std: float = 0.0) -> Expression:
    """Group-centred reward from the task's verifier, or from a critic."""
    return Reward(judge, std, min_std)


def outcome() -> Expression:
    """The reward itself, not compared with its group: for rewards whose sign means something, such as +1 and -1."""
    return Outcome()


def discounted(credit: Expression, gamma: float) -> Expression:
    """Reward-to-go of a credit; gamma = 0 is the credit itself."""
    return Discounted(credit, gamma) if gamma else credit
