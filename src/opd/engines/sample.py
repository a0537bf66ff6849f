"""One token per row from its logits and one uniform number: exact, and with the probability it was drawn with.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opd.engines.base import Sampling

WIDE = 4096  # a row of more ids is drawn from in two stages
BLOCK = 256  # ids of a block


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
    Inverse transform sampling on float64 cumulative sums: an id with probability zero owns an empty interval and is
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
    token_B1, total_B1 = _pick(prob_BV, uniform_B[:, None])
    return token_B1[:, 0], (prob_BV.gather(-1, token_B1).double() / total_B1).log_()[:, 0]


def _pick(weight_BV: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor]:
    """An id with probability proportional to its weight, and the sum of the weights (float64). [B, 1] each.

    A wide row first picks a block of ids and then, with what is left of the number, an id inside it: the running sums
    are short. The sum of a block is rounded like the softmax's own.
    """
    B, V = weight_BV.shape
    if V <= WIDE:
        index_B1, _, edge_BV = _invert(weight_BV, uniform_B1)
        return index_B1, edge_BV[:, -1:]
    whole = V // BLOCK * BLOCK
    sum_BN = torch.cat(
        [weight_BV[:, :whole].view(B, -1, BLOCK).sum(-1), weight_BV[:, whole:].sum(-1, keepdim=True)], dim=-1
    )
    block_B1, target_B1, edge_BN = _invert(sum_BN, uniform_B1)
    own_B1 = sum_BN.gather(-1, block_B1).double()
    rest_B1 = ((target_B1 - edge_BN.gather(-1, block_B1)) / own_B1 + 1.0).clamp_(0.0, 1.0)
    id_BK = block_B1 * BLOCK + torch.arange(BLOCK, device=weight_BV.device)
    index_B1, _, _ = _invert(weight_BV.gather(-1, id_BK.clamp(max=V - 1)) * (id_BK < V), rest_B1)
    return block_B1 * BLOCK + index_B1, edge_BN[:, -1:]


def _invert(weight_BN: Tensor, uniform_B1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """First index at which the running sum of the weights exceeds that share of the whole; never one of weight zero.

    Also the sum to exceed, and the running sums. [B, 1], [B, 1], [B, N].
    """
    edge_BN = weight_BN.cumsum(-1, dtype=torch.float64)
    total_B1 = edge_BN[:, -1:]
    # Rounding must not carry the target up to the total, where no interval is left.
    target_B1 = torch.minimum(uniform_B1 * total_B1, total_B1.nextafter(torch.zeros_like(total_B1)))
    index_B1 = torch.searchsorted(edge_BN, target_B1, right=True).clamp_(max=weight_BN.shape[-1] - 1)
    if edge_BN.device.type != "cpu":  # a parallel scan may fall by a rounding error: step back over empty intervals
        index_N = torch.arange(weight_BN.shape[-1], device=edge_BN.device)
        index_B1 = (index_N * ((index_N <= index_B1) & (weight_BN > 0))).amax(-1, keepdim=True)
    return index_B1, target_B1, edge_BN
