"""Numbers of a step, added up over tiles, micro-batches and ranks: sums, means with their own counts, maxima."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd.batch import Total


@dataclass
class Tally:
    """By name a sum and a count, in float64. A count of 0 marks a sum that is not divided. Maxima end in `_max`."""

    sums: dict[str, Tensor] = field(default_factory=dict)
    most: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, x: Tensor) -> None:
        """A part of a sum."""
        self._put(name, x, 0)

    def mean(self, name: str, x_n: Tensor) -> None:
        """Values of a mean; none of them leaves no name."""
        if len(x_n):
            self._put(name, x_n.double().sum(), len(x_n))

    def means(self, name: str, x_n: Tensor, place_n: Tensor) -> None:
        """Values of means by place in an answer, counted from 0: name of 1, 2, 4, ..., each up to twice as far."""
        octave_n = torch.frexp((place_n + 1).double()).exponent.long() - 1
        counts = octave_n.bincount()
        sums = x_n.new_zeros(len(counts), dtype=torch.float64).index_add(0, octave_n, x_n.double())
        for octave, count in enumerate(counts.tolist()):
            if count:
                self._put(name.format(2**octave), sums[octave], count)

    def max(self, name: str, x_n: Tensor) -> None:
        """Values of a maximum."""
        assert name.endswith("_max"), name
        if len(x_n):
            top = x_n.double().max()
            self.most[name] = torch.maximum(self.most[name], top) if name in self.most else top

    def _put(self, name: str, x: Tensor, count: int) -> None:
        both = torch.stack([x.double(), x.new_tensor(count, dtype=torch.float64)])
        self.sums[name] = self.sums[name] + both if name in self.sums else both

    def result(self, total: Total | None) -> dict[str, float]:
        """Every number, over all ranks."""
        sums, most = self.sums, {name: float(x) for name, x in self.most.items()}
        if total is not None:
            sums, most = total.named(sums), total.most(most)
        pairs = {name: (float(both[0]), float(both[1])) for name, both in sums.items()}
        return {name: x / count if count else x for name, (x, count) in pairs.items()} | most


def over_updates(each: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of several updates: the mean over those that have the number, or the largest."""
    names = dict.fromkeys(name for stats in each for name in stats)
    found = {name: [stats[name] for stats in each if name in stats] for name in names}
    return {name: max(x) if name.endswith("_max") else sum(x) / len(x) for name, x in found.items()}
