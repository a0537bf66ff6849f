"""Divergences between two next-token distributions, entry by entry.

Every function takes natural-log probabilities `s_nV` (student) and `t_nV` (teacher), normalised over V, and returns
entries [n, V] in nats whose sum over V is the divergence at that token; entries may be negative, their sum is not.
They are entry-wise so that a method may cap, gate or weigh entries before they are summed. Gradient flows through
`s_nV`; the caller detaches the teacher. Where the teacher's probability is exactly zero a forward term is 0, and a
reverse term is +inf unless the student's is zero too.

Shapes: n tokens, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def forward_kl(s_nV: Tensor, t_nV: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p (log p - log q). Gradient in the student's logits: q - p."""
    return _expect(t_nV, t_nV - s_nV)


def reverse_kl(s_nV: Tensor, t_nV: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v q (log q - log p). Gradient in the logits: q (d - E_q d), d = log q - log p."""
    return _expect(s_nV, s_nV - t_nV)


def jsd(s_nV: Tensor, t_nV: Tensor, *, beta: float) -> Tensor:
    """Generalized Jensen-Shannon of GKD (arXiv 2306.13649, eq. 1): beta KL(p || m) + (1 - beta) KL(q || m).

    m = beta p + (1 - beta) q, 0 < beta < 1. Its size shrinks with beta: jsd / beta tends to KL(p || q) as beta tends
    to 0 and jsd / (1 - beta) to KL(q || p) as beta tends to 1; no rescaling is done here, so beta = 1e-5 is *not*
    forward KL (TRL jumps there by special cases at exactly 0 and 1).
    """
    m_nV = _mixture(t_nV, s_nV, beta)
    return beta * _expect(t_nV, t_nV - m_nV) + (1 - beta) * _expect(s_nV, s_nV - m_nV)


def skew_forward_kl(s_nV: Tensor, t_nV: Tensor, *, alpha: float) -> Tensor:
    """KL(p || alpha p + (1 - alpha) q) (DistiLLM, arXiv 2402.03898). alpha = 0 is forward KL; bounded by -log alpha."""
    if alpha == 0:
        return forward_kl(s_nV, t_nV)
    return _expect(t_nV, t_nV - _mixture(t_nV, s_nV, alpha))


def skew_reverse_kl(s_nV: Tensor, t_nV: Tensor, *, alpha: float) -> Tensor:
    """KL(q || (1 - alpha) p + alpha q) (DistiLLM). alpha = 0 is reverse KL. The mixture is *not* detached."""
    if alpha == 0:
        return reverse_kl(s_nV, t_nV)
    return _expect(s_nV, s_nV - _mixture(t_nV, s_nV, 1 - alpha))


def tvd(s_nV: Tensor, t_nV: Tensor) -> Tensor:
    """Total variation: sum_v |q - p| / 2, in [0, 1]. Its f-generator is |u - 1| / 2."""
    return (s_nV.exp() - t_nV.exp()).abs() / 2


def entropy(logp_nV: Tensor) -> Tensor:
    """Entropy in nats [n]."""
    return -_expect(logp_nV, logp_nV).sum(-1)


def _expect(logp_nV: Tensor, x_nV: Tensor) -> Tensor:
    """p * x, with 0 where p is zero however infinite x is there; and so in the gradient, which must not see 0 * inf."""
    p_nV = logp_nV.exp()
    return p_nV * x_nV.masked_fill(p_nV == 0, 0.0)


def _mixture(t_nV: Tensor, s_nV: Tensor, share: float) -> Tensor:
    """log(share p + (1 - share) q)."""
    return torch.logaddexp(t_nV + math.log(share), s_nV + math.log1p(-share))
