"""A term on hidden states: the student's at some layers against a judge's at others, at the same loss tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

from opd import math
from opd.expression import Expression, Scope
from opd.types import Judge, Needs, Says

if TYPE_CHECKING:
    from torch import Tensor

Pairs = tuple[
    tuple[int, int], ...
]  # (the student's layer, the judge's): 0 the embeddings, n after layer n, -1 the last
Kind = Literal["cosine", "mse"]


class Inside(Scope, Protocol):
    """The scope of some tokens without the vocabulary axis, and with layers; gradient flows through the student's."""

    def layer(self, judge: Judge, pair: tuple[int, int], project: bool) -> tuple[Tensor, Tensor]:
        """[n, H] the student's states at the pair's first layer, projected, and the judge's at the second."""


@dataclass(frozen=True)
class Layers:
    """How far the student's hidden states are from the judge's: the mean over pairs of layers, per token.

    `cosine` is 1 - cos, `mse` the mean over the width of the squared difference. With `project` the student's states
    pass a linear map of the pair's own first, which learns with the student. Gradient through student and map only.
    """

    judge: Judge
    pairs: Pairs
    kind: Kind
    project: bool
    expressions: ClassVar[tuple[Expression, ...]] = ()

    def at(self, inside: Inside) -> Tensor:
        distance = getattr(math.states, self.kind)
        each = [distance(*inside.layer(self.judge, pair, self.project)) for pair in self.pairs]
        total: Tensor = sum(each[1:], each[0])
        return total / len(each)

    @property
    def needs(self) -> Needs:
        return {self.judge: Says.LAYERS}

    def __str__(self) -> str:
        at = ", ".join(f"{mine}~{theirs}" for mine, theirs in self.pairs)
        return f"{self.kind}({self.judge}, {'W ' if self.project else ''}π; layers {at})"
