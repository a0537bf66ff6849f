"""Gates: what a term is multiplied by at a token, without gradient. Gated tokens still count in the term's mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from opd import math
from opd.anchors import Against, Logp
from opd.expression import Expression, Reach, Scope, Whole
from opd.types import Judge, Needs, Says

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Band(Expression):
    """A gate: student / behaviour where it lies in [low, high], 0 where the trainer and the sampler disagree more."""

    low: float
    high: float
    which: Against = "old"

    def at(self, scope: Scope) -> Tensor:
        student: Tensor = getattr(scope, self.which)
        return math.trust.band((student - scope.behaviour).detach().exp(), self.low, self.high)

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({self.which, "behaviour"})

    def __str__(self) -> str:
        return f"band({str(Logp(self.which)).removeprefix('log ')}/μ, {self.low:g}, {self.high:g})"


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


@dataclass(frozen=True)
class PassRate(Expression):
    """A gate: p^a (1 - p)^b of the prompt, p the share of its group whose reward is above `success`."""

    a: float
    b: float
    success: float
    reach = Reach.GROUP

    def at(self, scope: Whole) -> Tensor:
        rate_B = math.credit.pass_rate(scope.reward, scope.group, self.success)
        return (rate_B**self.a * (1 - rate_B) ** self.b)[scope.row]

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"reward"})

    def __str__(self) -> str:
        return f"p^{self.a:g} (1 - p)^{self.b:g}"


@dataclass(frozen=True)
class Failed(Expression):
    """A gate: 1 on rows whose reward is not above `success`, 0 on the others."""

    success: float
    reach = Reach.SEQUENCE

    def at(self, scope: Whole) -> Tensor:
        reward_B = scope.reward
        return (reward_B <= self.success).to(reward_B.dtype).masked_fill(reward_B.isnan(), float("nan"))[scope.row]

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"reward"})

    def __str__(self) -> str:
        return f"[reward ≤ {self.success:g}]"


@dataclass(frozen=True)
class Best(Expression):
    """A gate: the size of the group on its row that the critic scores highest, 0 on the others."""

    judge: Judge
    reach = Reach.GROUP

    def at(self, scope: Whole) -> Tensor:
        return math.credit.best_of_group(scope.scored(self.judge).mean(0), scope.group, scope.finished)[scope.row]

    @property
    def own_needs(self) -> Needs:
        return {self.judge: Says.SCORE}

    def __str__(self) -> str:
        return f"n [score_{self.judge} = max of group]"


def band(low: float, high: float, which: Against = "old") -> Expression:
    """A masked importance weight between trainer and sampler."""
    return Band(low, high, which)


def pass_rate(a: float, b: float, success: float = 0.0) -> Expression:
    """A weight of the prompt by how often the student succeeds: 0 where never or always, highest at a / (a + b)."""
    return PassRate(a, b, success)


def failed(success: float = 0.0) -> Expression:
    """Only the rows that were not rewarded."""
    return Failed(success)


def best(judge: Judge) -> Expression:
    """Only the best row of each group; the mean over sequences is then one over best rows."""
    return Best(judge)


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


def unsure(judge: Judge, nats: float) -> Expression:
    """A hard gate on the judge's entropy; needs DENSE."""
    return Unsure(judge, nats)


def importance() -> Expression:
    """The importance weight of each token: the student over the distribution that it was sampled from."""
    return Importance()
