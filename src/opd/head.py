"""The output head, and a loss that runs through it in tiles: the [tokens x vocabulary] tensor never exists whole.

Shapes: N loss tokens, n tokens of a tile, H width, V real vocabulary (rows of the weight above it are padding).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

TILE = 1024  # tokens a tile, at most, when nobody says otherwise
ON_CPU = 2**22  # logits of a tile on a processor: more fall out of its caches (bench/head.py)


@dataclass(frozen=True)
class Head:
    """logits = softcap(scale * (h W^T + b)) on the first `vocab` rows: the last step of every causal LM."""

    weight: Tensor  # [padded V, H]
    vocab: int
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None

    def raw(self, h_nH: Tensor) -> Tensor:
        """h W^T + b [n, V], in the compute type."""
        bias = None if self.bias is None else self.bias[: self.vocab]
        return F.linear(h_nH, self.weight[: self.vocab], bias)

    def finish(self, raw_nV: Tensor) -> Tensor:
        """Scale and softcap, in float32 at least."""
        z_nV = raw_nV if raw_nV.dtype == torch.float64 else raw_nV.float()
        if self.scale != 1.0:
            z_nV = z_nV * self.scale
        return z_nV if self.softcap is None else self.softcap * torch.tanh(z_nV / self.softcap)

    def logits(self, h_nH: Tensor) -> Tensor:
        """[n, V] in float32 or float64."""
        return self.finish(self.raw(h_nH))


def token_logp(head: Head, h_NH: Tensor, token_N: Tensor, temperature: float, tile: int = TILE) -> Tensor:
    """Log-probability [N] of given tokens at a temperature, tile by tile, without gradient."""
    with torch.no_grad():
        out = []
        for at in tiles(len(token_N), tile):
            z_nV = head.logits(h_NH[at]) / temperature
            out.append(z_nV.gather(-1, token_N[at, None])[:, 0] - z_nV.logsumexp(-1))
        return torch.cat(out) if out else h_NH.new_zeros(0)


def fitting(head: Head) -> int:
    """Tokens of a tile for this vocabulary: fewer where it is large and a processor computes, for speed and memory."""
    return TILE if head.weight.is_cuda else max(128, min(TILE, ON_CPU // head.vocab))


def tiles(count: int, size: int, joined_N: Tensor | None = None) -> list[slice]:
    """Slices that cover range(count), of at most `size`.

    A token that is `joined` to the one before it stays in its slice: the slice ends earlier, or, where all of it hangs
    together, later.
    """
    if joined_N is None or not bool(joined_N.any()):
        return [slice(a, min(a + size, count)) for a in range(0, count, size)]
    edges = [*(~joined_N).nonzero()[:, 0].tolist(), count]  # where a slice may begin or end
    cuts, begun = [], 0
    for k, edge in enumerate(edges[1:]):
        if k + 2 == len(edges) or edges[k + 2] - begun > size:
            cuts.append(slice(begun, edge))
            begun = edge
    return cuts


def tiled_loss(
    head: Head,
    h_NH: Tensor,
    value: Callable[[slice, Tensor], Tensor],
    tile: int = TILE,
    joined_N: Tensor | None = None,
) -> Tensor:
    """sum over tiles of value(tile, logits_nV), with gradient to `h_NH` and to the head's weight and bias.

    The backward of each tile runs inside this forward, while its logits are at hand, so memory is that of one tile:
    a tile costs the products h W^T, g W and g^T h, and nothing of size [N, V] is kept. `value` must return a scalar.
    Tokens `joined` to the one before them are in its tile.
    """
    cuts = tiles(len(h_NH), tile, joined_N)
    scalar: Tensor = _Tiled.apply(h_NH, head.weight, head.bias, head, value, cuts)  # type: ignore[no-untyped-call]
    return scalar


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h_NH: Tensor, weight: Tensor, bias: Tensor | None, head: Head, value: Any, cuts: list[slice]
    ) -> Tensor:
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        V = head.vocab
        grad_h = torch.zeros_like(h_NH) if need_h else None
        grad_w = torch.zeros_like(weight) if need_w else None
        grad_b = torch.zeros_like(bias) if need_b and bias is not None else None
        total = torch.zeros((), dtype=torch.float64, device=h_NH.device)
        for at in cuts:
            raw_nV = head.raw(h_NH[at]).detach().requires_grad_()
            with torch.enable_grad():
                part = value(at, head.finish(raw_nV))
            total += part.detach()
            if not part.requires_grad:
                continue
            (g_nV,) = torch.autograd.grad(part, raw_nV)
            if grad_h is not None:
                grad_h[at] = (g_nV @ weight[:V].to(g_nV.dtype)).to(grad_h.dtype)
            if grad_w is not None:
                grad_w[:V] += (g_nV.T @ h_NH[at].to(g_nV.dtype)).to(grad_w.dtype)
            if grad_b is not None:
                grad_b[:V] += g_nV.sum(0).to(grad_b.dtype)
        ctx.grads = (grad_h, grad_w, grad_b)
        return total.to(torch.float64 if h_NH.dtype == torch.float64 else torch.float32)

    @staticmethod
    def backward(ctx: Any, *upstream: Any) -> Any:
        (scale,) = upstream
        scaled = [None if g is None else g * scale.to(g.dtype) for g in ctx.grads]
        return (*scaled, None, None, None)
