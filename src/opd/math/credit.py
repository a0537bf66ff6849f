"""Numbers that say how good a token or a rollout was. They never carry gradient: callers run them under no_grad.

Flat layout: N loss tokens of B rows, `row_N` the row of each token, tokens of a row adjacent and in order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]


def group_advantage(value_B: Tensor, group_B: Tensor, *, std: bool, min_std: float = 0.0) -> Tensor:
    """Value less its group's mean, over the group's standard deviation if `std` (GRPO, arXiv 2402.03300, eq. 3).

    The deviation is the unbiased one (n - 1), with 1e-6 added as verl does. A *degenerate* group (deviation not above
    `min_std`, values equal but for rounding, or one row alone) gets exactly 0: dividing by a tiny deviation turns noise
    into unit credit. A group in which a value is nan is nan. Returns [B].
    """
    _, index_B = group_B.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    groups = int(index_B.max()) + 1 if len(index_B) else 0
    total: Reduce = lambda x_B: value_B.new_zeros(groups).index_add(0, index_B, x_B)
    size_G = total(torch.ones_like(value_B))
    centred_B = value_B - (total(value_B) / size_G)[index_B]
    deviation_G = (total(centred_B.square()) / (size_G - 1).clamp_min(1)).sqrt()
    # Rewards equal on paper differ by rounding, and the mean adds its own: the range is what has none of the latter.
    most: Reduce = lambda x_B: value_B.new_zeros(groups).scatter_reduce(0, index_B, x_B, "amax", include_self=False)
    range_G, scale_G = most(value_B) + most(-value_B), most(value_B.abs())
    dead_G = (deviation_G <= min_std) | (range_G <= 4 * torch.finfo(value_B.dtype).eps * scale_G)
    if std:
        centred_B = centred_B / (deviation_G[index_B] + 1e-6)
    return centred_B.masked_fill(dead_G[index_B], 0.0)


def degenerate_groups(value_B: Tensor, group_B: Tensor, min_std: float = 0.0) -> Tensor:
    """True for each row [B] whose group teaches nothing: its values do not differ by more than `min_std`."""
    live_B = group_advantage(value_B, group_B, std=False, min_std=min_std) != 0  # nan counts as live
    ids, index_B = group_B.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    live_G = torch.zeros(len(ids), device=value_B.device).index_add(0, index_B, live_B.float())
    return live_G[index_B] == 0


def discounted(credit_N: Tensor, row_N: Tensor, gamma: float) -> Tensor:
    """Reward-to-go within a row, the token itself included: A_t = sum_k gamma^k a_{t+k}. gamma = 0: the credit.

    Differs from the tinker cookbook only where a row has gaps (several turns): positions count spoken tokens.
    """
    if gamma == 0:
        return credit_N
    rows, length_B = row_N.unique_consecutive(return_counts=True)  # type: ignore[no-untyped-call]
    longest = int(length_B.max()) if len(rows) else 0
    start_B = length_B.cumsum(0) - length_B
    out = torch.empty_like(credit_N)
    carry_B = torch.zeros(len(rows), dtype=credit_N.dtype, device=credit_N.device)
    for step in range(longest):  # from the last token of every row backwards, all rows at once
        live = length_B > step
        at = (start_B + length_B - 1 - step)[live]
        carry_B[live] = credit_N[at] + gamma * carry_B[live]
        out[at] = carry_B[live]
    return out
