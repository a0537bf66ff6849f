"""Distances between hidden states, per token. Shapes: n tokens, H width."""

from __future__ import annotations

import torch
from torch import Tensor


def cosine(a_nH: Tensor, b_nH: Tensor) -> Tensor:
    """1 - cos of the angle between them: 0 where they point the same way, whatever their lengths."""
    return 1 - torch.cosine_similarity(a_nH, b_nH, dim=-1)


def mse(a_nH: Tensor, b_nH: Tensor) -> Tensor:
    """The mean over the width of the squared difference."""
    return (a_nH - b_nH).square().mean(-1)
