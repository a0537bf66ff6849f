"""One token per row from its logits and one uniform number: exact, and with the probability it was drawn with.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.engines.base import Sampling


def kept(logits_BV: Tensor, sampling: Sampling) -> Tensor:
    """Which ids top-k, then top-p, then min-p leave (bool, [B, V]); `logits_BV` are those at the temperature."""
    keep_BV = torch.ones_like(logits_BV, dtype=torch.bool)
    if 0 < sampling.top_k < logits_BV.shape[-1]:
        keep_BV = logits_BV >= logits_BV.topk(sampling.top_k).values[:, -1:]
    if sampling.top_p < 1.0:
        prob_BV = logits_BV.masked_fill(~keep_BV, -torch.inf).softmax(-1).double()
        falling_BV, order_BV = prob_BV.sort(descending=True, stable=True)
        before_BV = falling_BV.cumsum(-1) - falling_BV
        keep_BV = torch.zeros_like(keep_BV).scatter(-1, order_BV, before_BV < sampling.top_p) & keep_BV
    if sampling.min_p > 0.0:
        prob_BV = logits_BV.softmax(-1)
        keep_BV &= prob_BV >= sampling.min_p * prob_BV.amax(-1, keepdim=True)
    return keep_BV


def draw(logits_BV: Tensor, uniform_B: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """Token ids [B] (int64) and their natural-log probabilities [B] (float64).

    `logits_BV` (float32 or float64) end at the real vocabulary; `uniform_B` (float64) lies in the open interval (0, 1).
    Inverse transform sampling on a float64 cumulative sum: an id with probability zero owns an empty interval and is
    never drawn. The probability recorded is the one of the distribution drawn from; in greedy decoding, the one at
    temperature 1. Logits that are not finite give a nan.
    """
    if sampling.greedy:
        token_B = logits_BV.argmax(-1)
        picked_B = logits_BV.gather(-1, token_B[:, None])[:, 0]
        return token_B, picked_B.double() - logits_BV.logsumexp(-1).double()
    if sampling.temperature != 1.0:
        logits_BV = logits_BV / sampling.temperature
    if sampling.truncated:
        logits_BV = logits_BV.masked_fill(~kept(logits_BV, sampling), -torch.inf)
    prob_BV = logits_BV.softmax(-1)
    edge_BV = prob_BV.cumsum(-1, dtype=torch.float64)
    total_B1 = edge_BV[:, -1:]
    # Rounding must not carry the target up to the total, where no interval is left.
    target_B1 = torch.minimum(uniform_B[:, None] * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    token_B1 = torch.searchsorted(edge_BV, target_B1, right=True).clamp_(max=logits_BV.shape[-1] - 1)
    if edge_BV.device.type != "cpu":  # a parallel scan may fall by a rounding error: step back over empty intervals
        ids_V = torch.arange(logits_BV.shape[-1], device=edge_BV.device)
        token_B1 = (ids_V * ((ids_V <= token_B1) & (prob_BV > 0))).amax(-1, keepdim=True)
    return token_B1[:, 0], (prob_BV.gather(-1, token_B1).double() / total_B1).log_()[:, 0]
