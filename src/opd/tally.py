"""Numbers of a step, added up over tiles, micro-batches and ranks: sums, and means with their own counts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from opd.batch import Total


@dataclass
class Tally:
    """By name a sum and a count, in float64. A count of 0 marks a sum that is not divided."""

    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, x: Tensor) -> None:
        """A part of a sum."""
        self._put(name, x, 0)

    def mean(self, name: str, x_n: Tensor) -> None:
        """Values of a mean; none of them leaves no name."""
        if len(x_n):
            self._put(name, x_n.double().sum(), len(x_n))

    def _put(self, name: str, x: Tensor, count: int) -> None:
        both = torch.stack([x.double(), x.new_tensor(count, dtype=torch.float64)])
        self.sums[name] = self.sums[name] + both if name in self.sums else both

    def result(self, total: Total | None) -> dict[str, float]:
        """Every number, over all ranks."""
        sums = self.sums if total is None else total.named(self.sums)
        pairs = {name: (float(both[0]), float(both[1])) for name, both in sums.items()}
        return {name: x / count if count else x for name, (x, count) in pairs.items()}
