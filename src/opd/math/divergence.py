"""Divergences between two next-token distributions, entry by entry.

Every function takes natural-log probabilities `s_nV` (student) and `t_nV` (teacher), normalised over V, and returns
entries [n, V] in nats whose sum over V is the divergence at that token; entries may be negative, their sum is not.
They are entry-wise so that a method may cap, gate or weigh entries before they are summed. Gradient flows through
`s_nV`; the caller detaches the teacher. Where the teacher's probability is exactly zero a forward term is 0, and a
reverse term is +inf unless the student's is zero too.

On part of the vocabulary (`opd.math.support`) the same functions are summed over what was kept; the sum may then be
negative, and need not be least where the two agree.

Shapes: n tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def forward_kl(s_nV: Tensor, t_nV: Tensor) -> Tensor:
    """KL(teacher || student) = sum_v p (log p - log q). Gradient in the student's logits: q - p."""
    return _expect(t_nV, t_nV - s_nV)


def reverse_kl(s_nV: Tensor, t_nV: Tensor) -> Tensor:
    """KL(student || teacher) = sum_v q (log q - log p). Gradient in the logits: q (d - E_q d), d = log q - log p."""
    return _expect(s_nV, s_nV - t_nV)


def soft_cross_entropy(s_nV: Tensor, t_nV: Tensor) -> Tensor:
    """-sum_v p log q: forward KL plus the teacher's entropy, so another value and the same gradient."""
    return -_expect(t_nV, s_nV)


def jsd(s_nV: Tensor, t_nV: Tensor, *, beta: float, scaled: bool = False) -> Tensor:
    """Generalized Jensen-Shannon of GKD (arXiv 2306.13649, eq. 1): beta KL(p || m) + (1 - beta) KL(q || m).

    m = beta p + (1 - beta) q. Its size shrinks with beta: jsd / beta tends to KL(p || q) as beta tends to 0 and
    jsd / (1 - beta) to KL(q || p) as beta tends to 1, so unscaled it is zero at both ends (TRL jumps there, by special
    cases at exactly 0 and 1).

    `scaled` divides by beta (1 - beta). Then beta goes from KL(p || q) at 0 to KL(q || p) at 1 without a jump, and near
    agreement every beta has the size of either, sum_v (p - q)^2 / 2q, so that the learning rate need not follow it.
    """
    if scaled and beta in (0, 1):
        return forward_kl(s_nV, t_nV) if beta == 0 else reverse_kl(s_nV, t_nV)
    m_nV = _mixture(t_nV, s_nV, beta)
    entries_nV = beta * _expect(t_nV, t_nV - m_nV) + (1 - beta) * _expect(s_nV, s_nV - m_nV)
    return entries_nV / (beta * (1 - beta)) if scaled else entries_nV


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


def alpha_divergence(s_nV: Tensor, t_nV: Tensor, *, alpha: float) -> Tensor:
    """(p^alpha q^(1 - alpha) - alpha p - (1 - alpha) q) / (alpha (alpha - 1)), no entry negative.

    Amari's family: alpha = 1 is forward KL and alpha = 0 reverse KL, both reached without a jump; alpha = 1/2 is four
    times `hellinger`, alpha = 2 half of `pearson`. Its f-generator is (u^alpha - alpha u - (1 - alpha)) / (alpha
    (alpha - 1)).
    """
    p_nV, q_nV = t_nV.exp(), s_nV.exp()
    if alpha == 1:
        return forward_kl(s_nV, t_nV) + q_nV - p_nV
    if alpha == 0:
        return reverse_kl(s_nV, t_nV) + p_nV - q_nV
    power_nV = (alpha * t_nV + (1 - alpha) * s_nV).exp()
    return (power_nV - alpha * p_nV - (1 - alpha) * q_nV) / (alpha * (alpha - 1))


def adaptive_kl(s_nV: Tensor, t_nV: Tensor, *, mu: float) -> Tensor:
    """AKL (arXiv 2404.02657): g_head KL(p || q) + g_tail KL(q || p), weighed by where the two differ.

    The head is the smallest set of the teacher's likeliest tokens whose mass reaches `mu`; g_head is the share of
    sum_v |p - q| that lies in it and g_tail the rest, both without gradient. Where p = q there is nothing to share and
    both are 0.
    """
    with torch.no_grad():
        p_nV = t_nV.exp()
        sorted_nV, order_nV = p_nV.sort(-1, descending=True)
        before_nV = sorted_nV.cumsum(-1) - sorted_nV
        head_nV = torch.zeros_like(p_nV).scatter(-1, order_nV, (before_nV < mu).to(p_nV.dtype))
        gap_nV = (p_nV - s_nV.exp()).abs()
        gap_n1 = gap_nV.sum(-1, keepdim=True)
        share_n1 = (gap_nV * head_nV).sum(-1, keepdim=True) / gap_n1.clamp_min(torch.finfo(gap_n1.dtype).tiny)
        rest_n1 = (1 - share_n1).masked_fill(gap_n1 == 0, 0.0)
    return share_n1 * forward_kl(s_nV, t_nV) + rest_n1 * reverse_kl(s_nV, t_nV)


def weighed_reverse_kl(s_nV: Tensor, t_nV: Tensor) -> Tensor:
    """Reverse KL as thunlp's code pushes it, token by token: weights without gradient, q over its sum of what is kept.

    Value: sum_v w (log q - log p). Gradient: sum_v w (log q - log p) grad log q. Over the whole vocabulary both are
    reverse KL's; over part of it the gradient is zero only where q = p there, mass included (arXiv 2604.13016).
    """
    w_nV = s_nV.detach().softmax(-1)
    gap_nV = (s_nV.detach() - t_nV).masked_fill(w_nV == 0, 0.0)
    return w_nV * gap_nV * (1 + (s_nV - s_nV.detach()).masked_fill(w_nV == 0, 0.0))


# --- the f-divergences, by generator ----------------------------------------------------------------------------------

Generator = Callable[[Tensor, float], Tensor]  # of x = log u <= 0, and of its parameter


def _kl(x: Tensor, _: float) -> Tensor:
    return _expect(x, x)


def _reverse_kl(x: Tensor, _: float) -> Tensor:
    return -x


def _jeffreys(x: Tensor, _: float) -> Tensor:
    return _expect(x, x) - x


def _jsd(x: Tensor, beta: float) -> Tensor:
    log_m = torch.log1p(beta * torch.expm1(x))  # m = beta u + 1 - beta
    return beta * _expect(x, x) - log_m.exp() * log_m


def _tvd(x: Tensor, _: float) -> Tensor:
    return -torch.expm1(x) / 2


def _alpha(x: Tensor, alpha: float) -> Tensor:
    if alpha == 1:
        return _expect(x, x) - torch.expm1(x)
    if alpha == 0:
        return torch.expm1(x) - x
    return (torch.expm1(alpha * x) - alpha * torch.expm1(x)) / (alpha * (alpha - 1))


def _hellinger(x: Tensor, _: float) -> Tensor:
    return torch.expm1(x / 2).square() / 2


def _pearson(x: Tensor, _: float) -> Tensor:
    return torch.expm1(x).square()


def _neyman(x: Tensor, _: float) -> Tensor:
    return torch.expm1(x).square() * (-x).exp()


def _same(parameter: float) -> float:
    return parameter


def _rest(parameter: float) -> float:
    return 1 - parameter


# Each with its mirror, the generator of the divergence with its arguments exchanged, and the mirror's parameter.
GENERATORS: Mapping[str, tuple[Generator, Generator, Callable[[float], float]]] = {
    "forward_kl": (_kl, _reverse_kl, _same),  # u log u
    "reverse_kl": (_reverse_kl, _kl, _same),  # -log u
    "jeffreys": (_jeffreys, _jeffreys, _same),  # (u - 1) log u
    "jsd": (_jsd, _jsd, _rest),  # b u log u - m log m, m = b u + 1 - b
    "tvd": (_tvd, _tvd, _same),  # |u - 1| / 2
    "alpha": (_alpha, _alpha, _rest),  # (u^a - a u - (1 - a)) / (a (a - 1))
    "hellinger": (_hellinger, _hellinger, _same),  # (sqrt u - 1)^2 / 2
    "pearson": (_pearson, _neyman, _same),  # (u - 1)^2
    "neyman": (_neyman, _pearson, _same),  # (u - 1)^2 / u
}


def f_divergence(s_nV: Tensor, t_nV: Tensor, *, generator: str, parameter: float = 0.5) -> Tensor:
    """sum_v q f(p / q), f convex and f(1) = 0, by the name of f in `GENERATORS`; `parameter` is jsd's beta or alpha.

    Written as q f(u) where u = p / q is at most 1 and as p f'(1 / u) elsewhere, f' the mirror: neither side overflows.
    """
    f, mirror, exchanged = GENERATORS[generator]
    x_nV = (t_nV - s_nV).masked_fill(t_nV.isneginf() & s_nV.isneginf(), 0.0)
    below_nV = s_nV.exp() * f(x_nV.clamp(max=0), parameter)
    above_nV = t_nV.exp() * mirror((-x_nV).clamp(max=0), exchanged(parameter))
    return torch.where(x_nV <= 0, below_nV, above_nV)


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
