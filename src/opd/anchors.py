"""Anchors: what the student's probability of a sampled token is held against, and what a trust region is centred on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from opd.expression import Expression, Scope
from opd.types import Judge, Needs, Says

if TYPE_CHECKING:
    from torch import Tensor

Against = Literal["live", "old", "behaviour"]


@dataclass(frozen=True)
class Logp(Expression):
    """The student's own log-probability of the sampled token: live, old, or as it was spoken."""

    which: Against

    def at(self, scope: Scope) -> Tensor:
        chosen: Tensor = getattr(scope, self.which)
        return chosen.detach()

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({self.which})

    def __str__(self) -> str:
        return {"live": "log π", "old": "log π_old", "behaviour": "log μ"}[self.which]


@dataclass(frozen=True)
class Blend(Expression):
    """share * log old + (1 - share) * log judge: a weighted geometric mean, whose ratio is (r_old)^share (r_judge)^(1 -
    share). With a `limit`, log r_judge is held in [-limit, limit] first.

    Gradient: log r rises by 1 for 1 of log student; where the limit holds, by `share` alone, for the judge's part of
    the ratio then stands still. At share 0 such a token gets no gradient at all.
    """

    judge: Judge
    share: float
    limit: float | None = None

    def at(self, scope: Scope) -> Tensor:
        if self.limit is None:
            return self.share * scope.old.detach() + (1 - self.share) * scope.judged(self.judge)
        live = scope.live.detach()
        return live - self.log_ratio(live, scope)

    def log_ratio(self, live_N: Tensor, scope: Scope) -> Tensor:
        if self.limit is None:
            return super().log_ratio(live_N, scope)
        over_judge = (live_N - scope.judged(self.judge).detach()).clamp(-self.limit, self.limit)
        return self.share * (live_N - scope.old.detach()) + (1 - self.share) * over_judge

    @property
    def own_needs(self) -> Needs:
        return {self.judge: Says.TOKEN}

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"old"} if self.limit is None else {"old", "live"})

    def __str__(self) -> str:
        if self.limit is None:
            return f"{self.share:g} log π_old + {1 - self.share:g} log {self.judge}"
        held = f"clamp(log π - log {self.judge}, ±{self.limit:g})"
        return f"log π - {self.share:g} (log π - log π_old) - {1 - self.share:g} {held}"


def behaviour() -> Expression:
    """The anchor of importance sampling: the engine that spoke."""
    return Logp("behaviour")


def old() -> Expression:
    """The anchor of PPO: the student just before the first update on this batch."""
    return Logp("old")


def live() -> Expression:
    """The student itself: the ratio is 1 and its gradient that of log π, so a push is plain REINFORCE."""
    return Logp("live")


def blend(judge: Judge, share: float, limit: float | None = None) -> Expression:
    """The geometric mean of old and a judge, `share` of it old; at share 1 it is old, and the judge is not asked."""
    return old() if share == 1 else Blend(judge, share, limit)
