"""Two models that speak with one voice: every token is drawn from a mixture of their distributions (MiniLLM).

Shapes: R rows that decode together, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from opd.engines.base import Decoder


@dataclass(frozen=True)
class Blend:
    """The other model of a blend, its share of every token's distribution, and what its forwards run inside."""

    model: nn.Module
    share: float
    entered: Callable[[], AbstractContextManager[Any]]


class Blended:
    """A decoder of two in lock step: every row is a row of both, and leaves both.

    At the sampling temperature its logits are those of share * other + (1 - share) * own, each of the two at that
    temperature and over the ids that are spoken; so whoever draws from them needs to know nothing of a blend.
    """

    def __init__(self, own: Decoder, other: Decoder, blend: Blend, temperature: float, vocab: int | None) -> None:
        self.own, self.other, self.blend = own, other, blend
        self.temperature, self.vocab = temperature, vocab
        self.refills, self.drops = own.refills and other.refills, own.drops and other.drops

    def admit(self, prompts: Sequence[Sequence[int]], copies: Sequence[int]) -> Tensor:
        """Prefill each prompt in both and append a row for each of `copies`; their logits [R, V]."""
        if not self.refills:  # all rows have finished; where none may leave early, one of the two still holds them
            for decoder in (self.own, self.other):
                if decoder.refills:
                    decoder.keep(torch.zeros(0, dtype=torch.long, device=next(self.blend.model.parameters()).device))
        own_RV = self.own.admit(prompts, copies)
        with self.blend.entered():
            other_RV = self.other.admit(prompts, copies)
        self.drops = self.own.drops and self.other.drops
        return self._mixed(own_RV, other_RV)

    def step(self, token_R: Tensor) -> Tensor:
        """The rows' next tokens in, their next logits [R, V] out."""
        own_RV = self.own.step(token_R)
        with self.blend.entered():
            other_RV = self.other.step(token_R)
        return self._mixed(own_RV, other_RV)

    def keep(self, index_R: Tensor) -> None:
        """Only these rows stay, in this order."""
        self.own.keep(index_R)
        self.other.keep(index_R)

    def _mixed(self, own_RV: Tensor, other_RV: Tensor) -> Tensor:
        own_RV, other_RV = self._logp(own_RV), self._logp(other_RV)
        share = self.blend.share
        if share < 1:
            other_RV = torch.logaddexp(own_RV + math.log1p(-share), other_RV + math.log(share))
        return self.temperature * other_RV

    def _logp(self, logits_RV: Tensor) -> Tensor:
        z_RV = logits_RV[:, : self.vocab]
        z_RV = z_RV if z_RV.dtype == torch.float64 else z_RV.float()
        return (z_RV / self.temperature).log_softmax(-1)
