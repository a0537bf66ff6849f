"""Credits: how good a sampled token was. `push` raises the token by its credit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from opd import math
from opd.anchors import Against, Logp
from opd.expression import Expression, Reach, Scope, Whole
from opd.schedule import Coefficient, Schedule, value
from opd.types import Judge, Needs, Says

if TYPE_CHECKING:
    from torch import Tensor

Combine = Literal["mean", "minimum", "lower_bound"]


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
class Reward(Expression):
    """A rollout's reward (the task's, or a critic's score) less its group's mean, over the deviation if `std`."""

    judge: Judge | None = None
    std: bool = False
    min_std: float = 0.0
    combine: Combine = "mean"
    width: float = 1.0
    reach = Reach.GROUP

    def at(self, scope: Whole) -> Tensor:
        value_B = scope.reward
        if self.judge is not None:
            value_B = math.credit.combined(scope.scored(self.judge), scope.group, self.combine, self.width)
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
        if self.combine != "mean":
            width = f"{self.width:g} " if self.combine == "lower_bound" else ""
            name = {"minimum": f"min {name}", "lower_bound": f"(mean - {width}std of {name})"}[self.combine]
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


@dataclass(frozen=True)
class Evident(Expression):
    """credit * [(1 - share) + share * clip((judge / student)^sign(credit), 1 - eps, 1 + eps)]: its sign stays."""

    inner: Expression
    evidence: Expression
    share: Coefficient
    eps: float
    parts = ("inner", "evidence")

    def at(self, scope: Scope) -> Tensor:
        credit_N, evidence_N = self.inner.value(scope), self.evidence.value(scope)
        return math.credit.evident(credit_N, evidence_N, value(self.share, scope.step), self.eps)

    def __str__(self) -> str:
        share = str(self.share) if isinstance(self.share, Schedule) else f"{self.share:g}"
        return f"({self.inner}) · (1 + {share} (clip[±{self.eps:g}](exp(±({self.evidence}))) - 1))"


def log_ratio(judge: Judge, against: Against = "live") -> Expression:
    """log judge - log student on the sampled token; needs TOKEN. Pushed on-policy it has the reverse KL's gradient."""
    return LogRatio(judge, against)


def reward(
    judge: Judge | None = None,
    *,
    std: bool = False,
    min_std: float = 0.0,
    combine: Combine = "mean",
    width: float = 1.0,
) -> Expression:
    """Group-centred reward from the task's verifier, or from a critic; `combine` is for several critics."""
    return Reward(judge, std, min_std, combine, width)


def outcome() -> Expression:
    """The reward itself, not compared with its group: for rewards whose sign means something, such as +1 and -1."""
    return Outcome()


def discounted(credit: Expression, gamma: float) -> Expression:
    """Reward-to-go of a credit; gamma = 0 is the credit itself."""
    return Discounted(credit, gamma) if gamma else credit


def evident(credit: Expression, evidence: Expression, share: Coefficient, eps: float) -> Expression:
    """A credit whose size follows a log-ratio and whose sign stays; with a share of 0 the log-ratio is not asked."""
    return credit if share == 0 else Evident(credit, evidence, share, eps)
