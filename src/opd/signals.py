"""Signals: what a judge said about the loss tokens of a batch. They hold no gradient.

Shapes: N loss tokens, n of a tile, M of one judge's rows, B rows, V vocabulary, H a judge's width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opd.aligned import Retokenized
from opd.head import TILE, Head, tiles, token_logp


@dataclass(frozen=True)
class Token:
    """A judge's log-probability of every loss token; nan where it had nothing to look at (`heard_N` is False)."""

    logp_N: Tensor
    heard_N: Tensor | None = None  # None: everywhere

    def rows(self, at_N: Tensor, _rows_B: Tensor) -> Token:
        return Token(self.logp_N[at_N], _some(self.heard_N, at_N))


@dataclass(frozen=True)
class TopK:
    """A judge's likeliest tokens at each loss token, likeliest first, and the sampled token's log-probability.

    `top_NK` are at `temperature`, of the whole vocabulary; `logp_N` is at that of the rollouts.
    """

    logp_N: Tensor
    ids_NK: Tensor
    top_NK: Tensor
    temperature: float = 1.0
    heard_N: Tensor | None = None

    def rows(self, at_N: Tensor, _rows_B: Tensor) -> TopK:
        logp_N, ids_NK, top_NK = self.logp_N[at_N], self.ids_NK[at_N], self.top_NK[at_N]
        return replace(self, logp_N=logp_N, ids_NK=ids_NK, top_NK=top_NK, heard_N=_some(self.heard_N, at_N))


@dataclass(frozen=True)
class Dense:
    """A judge's distribution, carried exactly as hidden states and a head; logits are made where they are read."""

    hidden_NH: Tensor
    head: Head
    heard_N: Tensor | None = None

    def logits(self, at: Tensor | slice) -> Tensor:
        with torch.no_grad():
            return self.head.logits(self.hidden_NH[at])

    def logp(self, token_N: Tensor, temperature: float) -> Tensor:
        """[N] of the sampled tokens."""
        return token_logp(self.head, self.hidden_NH, token_N, temperature)

    def top(self, k: int, temperature: float, tile: int = TILE) -> tuple[Tensor, Tensor]:
        """[N, K] the ids of the `k` likeliest tokens, likeliest first, and their log-probabilities; tile by tile."""
        parts = []
        for at in tiles(len(self.hidden_NH), tile):
            logp_nV = (self.logits(at) / temperature).log_softmax(-1)
            parts.append(logp_nV.topk(min(k, logp_nV.shape[1]), -1))
        return torch.cat([p.indices for p in parts]), torch.cat([p.values for p in parts])

    def rows(self, at_N: Tensor, _rows_B: Tensor) -> Dense:
        return replace(self, hidden_NH=self.hidden_NH[at_N], heard_N=_some(self.heard_N, at_N))


@dataclass(frozen=True)
class Layered(Dense):
    """A distribution, and the hidden states of some layers by their numbers, each [N, H]."""

    inner: Mapping[int, Tensor] = field(default_factory=dict)

    def rows(self, at_N: Tensor, rows_B: Tensor) -> Layered:
        inner = {depth: h_NH[at_N] for depth, h_NH in self.inner.items()}
        return replace(self, hidden_NH=self.hidden_NH[at_N], heard_N=_some(self.heard_N, at_N), inner=inner)


class Shelf:
    """Output heads of several judges, kept where their weights lie. At most one is on the device that computes."""

    def __init__(self, heads: Sequence[Head], device: torch.device) -> None:
        self.heads, self.device = tuple(heads), device
        self._taken: tuple[int, Head] | None = None

    def take(self, number: int) -> Head:
        """The head on the device; the one that was there before is let go first."""
        if self._taken is None or self._taken[0] != number:
            self._taken = None
            head = self.heads[number]
            bias = None if head.bias is None else head.bias.to(self.device)
            self._taken = (number, replace(head, weight=head.weight.to(self.device), bias=bias))
        return self._taken[1]


@dataclass(frozen=True)
class Experts:
    """Distributions of several judges, each of its own rows (DeepSeek-V4): widths may differ, the vocabulary may not.

    `judge_N` is who judges a token (its head's number on the shelf), `place_N` where among that judge's hidden states.
    """

    judge_N: Tensor
    place_N: Tensor
    hidden: tuple[Tensor, ...]
    shelf: Shelf
    heard_N: Tensor | None = None

    def logits(self, at: Tensor | slice) -> Tensor:
        judge_n, place_n = self.judge_N[at], self.place_N[at]
        out_nV: Tensor | None = None
        for number in judge_n.unique().tolist():  # type: ignore[no-untyped-call]
            mine = judge_n == number
            z_mV = self._logits(number, place_n[mine])
            if out_nV is None:
                out_nV = z_mV.new_zeros(len(judge_n), z_mV.shape[1])
            out_nV[mine] = z_mV
        assert out_nV is not None, "no token was asked for"
        return out_nV

    @torch.no_grad()
    def _logits(self, number: int, place_m: Tensor) -> Tensor:  # the head is not held on to: another may come next
        head = self.shelf.take(number)
        return head.logits(self._hidden(number, place_m, head))

    def _hidden(self, number: int, place_m: Tensor, head: Head) -> Tensor:
        h_MH = self.hidden[number]
        return h_MH[place_m.to(h_MH.device)].to(head.weight.device)

    def logp(self, token_N: Tensor, temperature: float) -> Tensor:
        """[N] of the sampled tokens."""
        out_N = torch.zeros(len(token_N), dtype=self.hidden[0].dtype, device=token_N.device)
        for number in self.judge_N.unique().tolist():  # type: ignore[no-untyped-call]
            mine = (self.judge_N == number).nonzero()[:, 0]
            logp_m = self._logp(number, self.place_N[mine], token_N[mine], temperature)
            out_N = out_N.to(logp_m.dtype).index_copy(0, mine, logp_m)
        return out_N

    def _logp(self, number: int, place_m: Tensor, token_m: Tensor, temperature: float) -> Tensor:
        head = self.shelf.take(number)
        return token_logp(head, self._hidden(number, place_m, head), token_m, temperature)

    def rows(self, at_N: Tensor, _rows_B: Tensor) -> Experts:
        return replace(self, judge_N=self.judge_N[at_N], place_N=self.place_N[at_N], heard_N=_some(self.heard_N, at_N))


def _some(x_N: Tensor | None, at_N: Tensor) -> Tensor | None:
    return None if x_N is None else x_N[at_N]


@dataclass(frozen=True)
class Score:
    """A critic's number for every row [B], or each of several critics' [K, B]."""

    said: Tensor

    @property
    def value_KB(self) -> Tensor:
        return self.said if self.said.ndim == 2 else self.said[None]

    @property
    def value_B(self) -> Tensor:
        """Their mean."""
        return self.value_KB.mean(0)

    def rows(self, _at_N: Tensor, rows_B: Tensor) -> Score:
        return Score(self.said[..., rows_B])


Distribution = Dense | Experts
Signal = Token | TopK | Distribution | Score | Retokenized
