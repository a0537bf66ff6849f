"""Anchors: what the student's probability of a sampled token is held against, and what a trust region is centred on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from opd.expression import Expression, Scope

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


def behaviour() -> Expression:
    """The anchor of importance sampling: the engine that spoke."""
    return Logp("behaviour")


def old() -> Expression:
    """The anchor of PPO: the student just before the first update on this batch."""
    return Logp("old")


def live() -> Expression:
    """The student itself: the ratio is 1 and its gradient that of log π, so a push is plain REINFORCE."""
    return Logp("live")
