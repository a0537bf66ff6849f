"""How far a sampled token may be moved: ratios, clips, bands.

`logp` are natural-log probabilities of the sampled tokens [N]; ratios are plain numbers, 1 where nothing moved.
"""

from __future__ import annotations

import torch
from torch import Tensor


def surrogate(log_ratio_N: Tensor, credit_N: Tensor, clip: tuple[float, float] | None) -> Tensor:
    """-min(r a, clip(r, 1 - low, 1 + high) a) [N], r = exp(log_ratio) (PPO, arXiv 1707.06347, eq. 7).

    The gradient is -r a grad(log_ratio), and exactly zero where a > 0 and r > 1 + high, or a < 0 and r < 1 - low.
    `clip=None` is plain importance sampling.
    """
    ratio_N = log_ratio_N.exp()
    if clip is None:
        return -ratio_N * credit_N
    low, high = clip
    return -torch.minimum(ratio_N * credit_N, ratio_N.clamp(1 - low, 1 + high) * credit_N)


def k3(live_N: Tensor, other_N: Tensor) -> Tensor:
    """exp(d) - d - 1, d = other - live, clamped as the papers' code does (d to +-20, the value to +-10). [N].

    In expectation over the student its *value* is KL(student || other), but its *gradient* is that of
    KL(other || student): the forward direction.
    """
    d_N = (other_N - live_N).clamp(-20, 20)
    return (d_N.exp() - d_N - 1).clamp(-10, 10)


def band(ratio_N: Tensor, low: float, high: float) -> Tensor:
    """The ratio where low <= ratio <= high, and 0 outside: a masked importance weight (IcePop)."""
    return torch.where((ratio_N >= low) & (ratio_N <= high), ratio_N, torch.zeros_like(ratio_N))
