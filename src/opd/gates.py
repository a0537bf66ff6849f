"""Gates: what a term is multiplied by at a token, without gradient. Gated tokens still count in the term's mean."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from opd import math
from opd.expression import Expression, Scope

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


def band(low: float, high: float) -> Expression:
    """A masked importance weight between trainer and sampler."""
    return Band(low, high)
