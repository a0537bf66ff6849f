"""Linear maps from the student's width to a judge's, and the terms of a loss that stand on hidden states.

Shapes: N loss tokens of a batch, m of a micro-batch, H widths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from opd.batch import Batch, Prepared
from opd.errors import UsageError
from opd.expression import Expression
from opd.layered import Layers
from opd.loss import Loss
from opd.signals import Layered
from opd.tally import Tally
from opd.types import Judge

Pair = tuple[int, int]


def name_of(judge: Judge, pair: Pair) -> str:
    """A map's name, as parameters can be called."""
    return f"{judge.role}_{judge.view}_{pair[0]}_{pair[1]}"


class Projectors(nn.ModuleDict):
    """The maps that a loss asks, by judge and pair of layers. They learn with the student and are no part of it."""

    def fit(self, loss: Loss, batch: Batch, width: int, like: Tensor) -> bool:
        """Make what is missing, of the widths that are there, and drop what this loss does not ask. Was any changed?

        A new map is the identity as far as it goes: nothing is drawn. Raises `UsageError` where states of two widths
        are to be compared without one.
        """
        wanted: dict[str, int] = {}
        for head in (t.head for t in loss.token_terms if isinstance(t.head, Layers)):
            for pair in head.pairs:
                signal = batch.signals[head.judge]
                assert isinstance(signal, Layered)
                theirs = signal.inner[pair[1]].shape[1]
                if head.project:
                    wanted[name_of(head.judge, pair)] = theirs
                elif theirs != width:
                    raise UsageError(
                        f"layer {pair[0]} of the student is {width} wide and layer {pair[1]} of `{head.judge}` "
                        f"{theirs}: they cannot be compared as they are; let them be projected"
                    )
        changed = self.keys() != wanted.keys()
        for name in [n for n in self if n not in wanted]:
            del self[name]
        for name, theirs in wanted.items():
            if name not in self:
                self[name] = _linear(torch.eye(theirs, width).to(like))
        return changed

    def take(self, weights: Mapping[str, Tensor], like: Tensor) -> None:
        """The maps of a checkpoint in place of those that are here."""
        self.clear()
        for name, weight in weights.items():
            self[name.removesuffix(".weight")] = _linear(weight.to(like))


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight)
    return made


class InsideScope:
    """The scope of a micro-batch's loss tokens, with the layers of both sides (`layered.Inside`)."""

    def __init__(self, states: Mapping[int, Tensor], maps: Projectors, batch: Batch, prepared: Prepared, at: Tensor):
        self.states, self.maps, self.batch, self.prepared, self.at = states, maps, batch, prepared, at
        self.step, self.behaviour = prepared.step, batch.behaviour_N[at].nan_to_num(0.0, 0.0, 0.0)

    def layer(self, judge: Judge, pair: Pair, project: bool) -> tuple[Tensor, Tensor]:
        signal, mine_mH = self.batch.signals[judge], self.states[pair[0]]
        assert isinstance(signal, Layered)
        if project:
            mine_mH = self.maps[name_of(judge, pair)](mine_mH)
        exact = torch.float64 if mine_mH.dtype == torch.float64 else torch.float32
        return mine_mH.to(exact), signal.inner[pair[1]][self.at].to(mine_mH.device, exact)

    def heard(self, judge: Judge) -> Tensor:
        return self.batch.heard(judge)[self.at]

    def judged(self, judge: Judge) -> Tensor:
        return self.batch.judged(judge)[self.at].nan_to_num(0.0, 0.0, 0.0)

    def column(self, expression: Expression) -> Tensor:
        return self.prepared.columns[expression][self.at].nan_to_num(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Beside:
    """What stands on hidden states in a loss, beside what is taken in tiles over the vocabulary."""

    loss: Loss
    batch: Batch
    prepared: Prepared
    tally: Tally

    @property
    def depths(self) -> tuple[int, ...]:
        """The student's layers that are read."""
        heads = [t.head for t in self.loss.token_terms if isinstance(t.head, Layers)]
        return tuple(sorted({mine for head in heads for mine, _ in head.pairs}))

    def value(self, states: Mapping[int, Tensor], maps: Projectors, at_m: Tensor) -> Tensor:
        """The weighted terms of a micro-batch, a scalar with gradient, each added to the tally."""
        scope = InsideScope(states, maps, self.batch, self.prepared, at_m)
        parts = []
        for k, term in enumerate(self.loss.token_terms):
            if isinstance(term.head, Layers):
                parts.append((self.prepared.weight_KN[k, at_m] * term.at(scope)).sum())
                self.tally.add(f"loss/{term.name}", parts[-1].detach())
        return torch.stack(parts).sum()
