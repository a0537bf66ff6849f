"""Gates: what a term is multiplied by at a token, without gradient. Gated tokens still count in the term's mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd import math
from opd.expression import Expression, Scope
from opd.types import Judge, Needs, Says

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Band(Expression):
    """A gate: old / behaviour where it lies in [low, high], 0 where the trainer and the sampler disagree more."""

    low: float
    high: float

    def at(self, scope: Scope) -> Tensor:
        return math.trust.band((scope.old - scope.behaviour).detach().exp(), self.low, self.high)

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"old", "behaviour"})

    def __str__(self) -> str:
        return f"band(π_old/μ, {self.low:g}, {self.high:g})"


@dataclass(frozen=True)
class Truncated(Expression):
    """A gate: min(live / old, high), the importance weight of a student that has moved, cut from above."""

    high: float

    def at(self, scope: Scope) -> Tensor:
        return (scope.live - scope.old).detach().exp().clamp(max=self.high)

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"live", "old"})

    def __str__(self) -> str:
        return f"min(π/π_old, {self.high:g})"


@dataclass(frozen=True)
class Heard(Expression):
    """1 where the judge's view exists (there is a hint, an answer, a context), 0 where the judge has nothing to see."""

    judge: Judge

    def at(self, scope: Scope) -> Tensor:
        return scope.heard(self.judge)

    @property
    def own_needs(self) -> Needs:
        return {self.judge: Says.TOKEN}

    def __str__(self) -> str:
        return f"[{self.judge} heard]"


def truncated(high: float) -> Expression:
    """Truncated importance sampling over the updates on one batch; 1 at the first."""
    return Truncated(high)


def heard(judge: Judge) -> Expression:
    """Says what a loss does where a judge has nothing to look at: nothing. Without it such rows are refused."""
    return Heard(judge)


@dataclass(frozen=True)
class Unsure(Expression):
    """A gate: 1 where the entropy of the judge's whole distribution, at temperature 1, exceeds `nats`; 0 elsewhere."""

    judge: Judge
    nats: float

    def at(self, scope: Any) -> Tensor:  # a tile's: entropy needs the vocabulary axis
        logp_nV = scope.distribution(self.judge, 1.0)
        return (math.divergence.entropy(logp_nV) > self.nats).to(logp_nV.dtype)

    @property
    def own_needs(self) -> Needs:
        return {self.judge: Says.DENSE}

    def __str__(self) -> str:
        return f"[H({self.judge}) > {self.nats:g}]"


@dataclass(frozen=True)
class Importance(Expression):
    """old / behaviour: what a token that another distribution sampled is worth to the student's."""

    def at(self, scope: Scope) -> Tensor:
        return (scope.old - scope.behaviour).detach().exp()

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"old", "behaviour"})

    def __str__(self) -> str:
        return "π_old/μ"


def band(low: float, high: float) -> Expression:
    """A masked importance weight between trainer and sampler."""
    return Band(low, high)


def unsure(judge: Judge, nats: float) -> Expression:
    """A hard gate on the judge's entropy; needs DENSE."""
    return Unsure(judge, nats)


def importance() -> Expression:
    """The importance weight of each token: the student over the distribution that it was sampled from."""
    return Importance()
