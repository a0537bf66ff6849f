"""What the critic met in earlier steps, for it to meet again beside the fresh pairs.

Without it the critic may forget what the student no longer says, and the student may come back to it. Nothing here has
a state of its own: a step makes a new memory, and a draw is a function of (seed, step), so that a resumed run draws
what an unbroken one does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from opd.critic import Pairs, join
from opd.engines.noise import uniform


@dataclass(frozen=True)
class Replay:
    """The pairs of the last `span` steps, by step; a span of 0 remembers nothing."""

    span: int = 0
    steps: tuple[tuple[int, Pairs], ...] = ()

    def after(self, step: int, pairs: Pairs) -> Replay:
        """The memory when this step's pairs are in it and those of `span` steps ago are out."""
        both = (*self.steps, (step, pairs))
        return replace(self, steps=tuple((s, p) for s, p in both if s > step - self.span and p.count))

    def draw(self, count: int, seed: int, step: int) -> Pairs:
        """At most `count` of the pairs of the `span` steps before `step`, each at most once, all equally likely."""
        recent = [(s, pairs) for s, pairs in self.steps if step - self.span <= s < step]
        old = join([pairs for _, pairs in recent])
        if old.count <= count:
            return old
        made = np.concatenate([np.full(pairs.count, s, np.uint64) for s, pairs in recent])
        place = np.concatenate([np.arange(pairs.count) for _, pairs in recent])
        chosen = np.argsort(uniform(seed, step, made, place, 0), kind="stable")[:count]
        return old.at(torch.from_numpy(np.sort(chosen)))


def tensors(memory: Replay) -> dict[str, Tensor]:
    """The memory as named tensors, for a checkpoint."""
    found: dict[str, Tensor] = {}
    for step, pairs in memory.steps:
        found |= {
            f"{step}/tokens": torch.tensor([token for row in pairs.rows for token in row], dtype=torch.int32),
            f"{step}/lengths": torch.tensor([len(row) for row in pairs.rows], dtype=torch.int32),
            f"{step}/good": pairs.good_P,
            f"{step}/bad": pairs.bad_P,
            f"{step}/weight": pairs.weight_P,
        }
    return found


def from_tensors(span: int, found: Mapping[str, Tensor]) -> Replay:
    """What `tensors` took apart."""
    steps = sorted({int(name.split("/")[0]) for name in found})
    return Replay(span, tuple((step, _pairs(step, found)) for step in steps))


def _pairs(step: int, found: Mapping[str, Tensor]) -> Pairs:
    tokens, lengths, good_P, bad_P, weight_P = (
        found[f"{step}/{part}"] for part in ("tokens", "lengths", "good", "bad", "weight")
    )
    rows = tuple(tuple(row.tolist()) for row in torch.split(tokens, lengths.tolist()))
    return Pairs(rows, good_P, bad_P, weight_P)
