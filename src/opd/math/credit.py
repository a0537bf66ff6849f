"""Numbers that say how good a token or a rollout was. They never carry gradient: callers run them under no_grad.

Flat layout: N loss tokens of B rows, `row_N` the row of each token, tokens of a row adjacent and in order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

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


def combined(value_KB: Tensor, group_B: Tensor, how: str, width: float = 1.0) -> Tensor:
    """[B] one number a row out of K critics': `mean`, `minimum`, or `lower_bound`, the mean - width * deviation.

    A critic that learned from pairs is known up to a number per prompt, so each is centred in its group first: else the
    minimum would be the whole word of the critic that happens to lie lowest. The deviation is over critics, of K.
    """
    if how == "mean" or len(value_KB) == 1:
        return value_KB.mean(0)
    centred_KB = torch.stack([group_advantage(value_B, group_B, std=False) for value_B in value_KB])
    if how == "minimum":
        return centred_KB.amin(0)
    return centred_KB.mean(0) - width * centred_KB.std(0, correction=0)


def disagreement(value_KB: Tensor, group_B: Tensor) -> Tensor:
    """Deviation over critics of what they give a row beside its group, averaged over rows; 0 of one critic."""
    centred_KB = torch.stack([group_advantage(value_B, group_B, std=False) for value_B in value_KB])
    return centred_KB.std(0, correction=0).mean()


def evident(credit_N: Tensor, evidence_N: Tensor, share: float, eps: float) -> Tensor:
    """credit [(1 - share) + share clip(w, 1 - eps, 1 + eps)], w = exp(sign(credit) evidence) (RLSD, arXiv 2604.03128).

    The sign is the credit's; the size is moved by at most share * eps of it. A credit of 0 stays 0.
    """
    weight_N = (credit_N.sign() * evidence_N).exp().clamp(1 - eps, 1 + eps)
    return credit_N * ((1 - share) + share * weight_N)


def pass_rate(value_B: Tensor, group_B: Tensor, success: float) -> Tensor:
    """Share of each row's group whose value is above `success`; nan where one of the group is missing. [B]."""
    _, index_B = group_B.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    passed_B = (value_B > success).to(value_B.dtype).masked_fill(value_B.isnan(), float("nan"))
    size_G = torch.bincount(index_B).to(value_B.dtype)
    return (value_B.new_zeros(len(size_G)).index_add(0, index_B, passed_B) / size_G)[index_B]


def best_of_group(value_B: Tensor, group_B: Tensor, finished_B: Tensor) -> Tensor:
    """Group size on the row of its group's highest value, 0 on the others: its mean over rows is one over the bests.

    Equals share it; of equals a row that ended by itself goes before one that was cut. A group without a winner (all
    alike in both) is 0 everywhere. A group in which a value is nan is nan. Returns [B].
    """
    out_B = torch.zeros_like(value_B)
    for group in group_B.unique():  # type: ignore[no-untyped-call]
        own_B = group_B == group
        best_B = own_B & (value_B == value_B[own_B].max())
        if (best_B & finished_B).any():
            best_B &= finished_B
        if value_B[own_B].isnan().any():
            out_B[own_B] = float("nan")
        elif best_B.sum() < own_B.sum():
            out_B[best_B] = (own_B.sum() / best_B.sum()).to(out_B)
    return out_B


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


def future(credit_N: Tensor, row_N: Tensor, *, mean: bool) -> Tensor:
    """The sum or the mean of a row's credits after each token, exactly 0 at its last: MiniLLM's R_{t+1}.

    arXiv 2306.08543, section 2.2. The mean divides by the number of summands; the paper prints one less, which would be
    0 before the last token.
    """
    togo_N = discounted(credit_N, row_N, 1.0)
    out_N = torch.zeros_like(credit_N)
    out_N[:-1] = torch.where(row_N[1:] == row_N[:-1], togo_N[1:], out_N[1:])
    return out_N / (remaining(row_N, credit_N.dtype) - 1).clamp_min(1) if mean else out_N


def remaining(row_N: Tensor, dtype: torch.dtype) -> Tensor:
    """[N] how many tokens of its row are left, each token itself included."""
    return discounted(torch.ones(len(row_N), dtype=dtype, device=row_N.device), row_N, 1.0)


def whitened(credit_N: Tensor, own_N: Tensor, total: Reduce) -> Tensor:
    """Credits less the mean of `own_N` tokens, over their deviation (population, 1e-8 added to the variance).

    `total` adds a tensor over ranks, so that every rank uses the numbers of the whole batch.
    """
    own: Reduce = lambda x_N: x_N.masked_fill(~own_N, 0.0).sum()
    count = total(own_N.sum().to(credit_N.dtype)).clamp_min(1)
    mean = total(own(credit_N)) / count
    variance = total(own((credit_N - mean).square())) / count
    return (credit_N - mean) * torch.rsqrt(variance + 1e-8)


# --- preferences (DPO) ------------------------------------------------------------------------------------------------


def margins(gain_N: Tensor, row_N: Tensor, prompt_B: Tensor, good_B: Tensor, bad_B: Tensor) -> tuple[Tensor, Tensor]:
    """[B, B] the sum of gains of row i less that of row j, and where i is a good and j a bad row of one prompt."""
    total_B = gain_N.new_zeros(len(prompt_B)).index_add(0, row_N, gain_N)
    pair_BB = good_B[:, None] & bad_B & (prompt_B[:, None] == prompt_B)
    return total_B[:, None] - total_B, pair_BB


def preference(z_BB: Tensor, pair_BB: Tensor, beta: float) -> Tensor:
    """[B] +beta sigmoid(-z) of good rows and -beta sigmoid(-z) of bad ones, the mean over a row's pairs; else 0.

    DPO's loss -log sigmoid(z), z = beta (log-ratio of the good row - of the bad row) (arXiv 2305.18290, eq. 7), has
    the gradient -beta sigmoid(-z) (grad log pi(good) - grad log pi(bad)).
    """
    weight_BB = (beta * torch.sigmoid(-z_BB)).masked_fill(~pair_BB, 0.0)
    goods, bads = pair_BB.sum(1).clamp_min(1), pair_BB.sum(0).clamp_min(1)
    return weight_BB.sum(1) / goods - weight_BB.sum(0) / bads


def dpo(z_BB: Tensor, pair_BB: Tensor) -> dict[str, Tensor]:
    """Of every pair DPO's loss, whether the student orders it rightly (a tie is a half) and the margin z."""
    z_P = z_BB[pair_BB].double()
    right_P = (z_P > 0).double() + 0.5 * (z_P == 0).double()
    return {"preference/loss": -F.logsigmoid(z_P), "preference/accuracy": right_P, "preference/margin": z_P}
