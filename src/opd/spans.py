"""What a `match` makes small where judge and student have different tokenizers, and what such a judge cannot be asked.

Here a loss has its value once a *span*: the shortest run of the student's tokens and of the judge's that cover the same
bytes of text. What a span is worth to either side is the chain rule's (`math.align.merged`), so that gradient reaches
the student's earlier tokens of a span too; tokens that are in no span are not counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from opd import math
from opd.credits import SpanRatio
from opd.divergences import Divergence
from opd.expression import Expression, Scaled, Sum
from opd.loss import K3, Loss, Match, Push, Term
from opd.types import RETOKENIZED, Judge, Says

if TYPE_CHECKING:
    from torch import Tensor

    from opd.expression import Whole
    from opd.loss import Tile

MATCHED, REST = "w_m", "w_u"


@dataclass(frozen=True)
class Hybrid:
    """w_m D(judge, student) over the tokens that both vocabularies have + w_u sorted L1 over the rest, once a span.

    Both on the merged probabilities as they are, of which neither part sums to 1. Weights that are None are the share
    of the judge's vocabulary that is mapped, and what is left of 1. `stop=False` leaves the stop token out.
    """

    inner: Divergence
    mapped: float | None = None
    rest: float | None = None
    stop: bool = True
    unit: ClassVar[str] = "span"
    asks: ClassVar[Says] = Says.DENSE

    @property
    def temperature(self) -> float:
        """Divides both sides' logits."""
        return self.inner.temperature

    def between(self, tile: Tile, judge: Judge) -> Tensor:
        """[n] the value of each span at its last token."""
        pair = tile.crossed(judge, self.temperature, "span")
        weight_m = pair.share if self.mapped is None else self.mapped
        weight_u = 1 - pair.share if self.rest is None else self.rest
        value_g = weight_m * pair.matched(self.inner.entries)
        if weight_u:
            value_g = value_g + weight_u * pair.rest()
        return pair.put(value_g, len(tile.live))

    def counted(self, scope: Whole, judge: Judge) -> Tensor:
        """[N] the last token of each span."""
        return scope.alignment(judge).counted("span", self.stop)

    def __str__(self) -> str:
        weights = [
            MATCHED if self.mapped is None else f"{self.mapped:g}",
            REST if self.rest is None else f"{self.rest:g}",
        ]
        return f"({weights[0]} {self.inner} + {weights[1]} sorted_l1)"


@dataclass(frozen=True)
class Ranked:
    """Sorted L1 over both whole distributions, the k-th token of one answer beside the k-th of the other (ULD)."""

    temperature: float = 1.0
    unit: ClassVar[str] = "t"
    asks: ClassVar[Says] = Says.DENSE

    def between(self, tile: Tile, judge: Judge) -> Tensor:
        """[n] at each token that has a partner."""
        pair = tile.crossed(judge, self.temperature, "index")
        return pair.put(math.align.sorted_l1(pair.s_gV, pair.t_gW), len(tile.live))

    def counted(self, scope: Whole, judge: Judge) -> Tensor:
        """[N] the tokens that have a partner: as many as the shorter answer has."""
        return scope.alignment(judge).counted("index", stop=True)

    def __str__(self) -> str:
        return "sorted_l1" if self.temperature == 1 else f"sorted_l1(temperature={self.temperature:g})"


# --- what cannot be asked --------------------------------------------------------------------------------------------


def refusals(loss: Loss, method: str) -> Iterator[str]:
    """A sentence for each place where a loss would read a retokenized judge token by token."""
    for term in loss.token_terms:
        head = term.head
        if isinstance(head, Match) and (head.judge.view == RETOKENIZED) == isinstance(head.divergence, Divergence):
            yield (
                f"{method} compares `{head.judge}` with the student by {head.divergence}: tokens of another tokenizer "
                "have no partner each, and tokens of the same have; match a retokenized judge by `hybrid` or `ranked`, "
                "and any other by a divergence"
            )
        for place, judge in _misread(term):
            yield (
                f"{method} makes {place} of `{judge}`, which reads the text in tokens of its own: it has a probability "
                "for a span of text and none for a token of the student's. It can be a target (`match`) or a credit "
                "(`log_ratio`), and no anchor, weight, gate or penalty"
            )


def _misread(term: Term) -> Iterator[tuple[str, Judge]]:
    """Where a term reads a retokenized judge as if it had a number for every token of the student's."""
    head = term.head
    if isinstance(head, K3) and head.judge.view == RETOKENIZED:
        yield "a k3 penalty", head.judge
    outer = [("a gate", gate) for gate in term.gates]
    if isinstance(head, Push):
        outer += [("an anchor", head.anchor), ("a weight or a reward-to-go", head.credit)]
    for place, expression in outer:
        credit = _summed(expression) if isinstance(head, Push) and expression is head.credit else []
        for part in expression.every():
            if not (isinstance(part, SpanRatio) and any(part is c for c in credit)):
                yield from ((place, judge) for judge in part.own_needs if judge.view == RETOKENIZED)


def _summed(credit: Expression) -> list[Expression]:
    """The parts that a credit is a weighted sum of."""
    if isinstance(credit, Sum | Scaled):
        return [part for child in credit.children for part in _summed(child)]
    return [credit]


def hybrid(inner: Divergence, *, mapped: float | None = None, rest: float | None = None, stop: bool = True) -> Hybrid:
    """A divergence on the tokens that both vocabularies have, sorted L1 on the rest; for a retokenized judge."""
    return Hybrid(inner, mapped, rest, stop)


def ranked(temperature: float = 1.0) -> Ranked:
    """Sorted L1 over whole distributions, place by place; for a retokenized judge."""
    return Ranked(temperature)
