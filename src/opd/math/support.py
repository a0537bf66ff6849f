"""Part of a vocabulary: what is left of two distributions when a divergence is summed over few tokens.

Which tokens are kept, and what becomes of the rest, changes the objective and not only its cost: docs/sparse.md has the
table. Shapes: n tokens, V vocabulary, K kept (and one more for the rest, where it is a bucket).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from opd.divergences import Rest, Whose

NOWHERE = -1e4  # the log-probability of a slot that holds no token: its probability is exactly 0, and finite its slope
LEAST = 1e-7  # the least that a bucket holds


def cut(s_nV: Tensor, t_nV: Tensor, *, whose: Whose, k: int, rest: Rest) -> tuple[Tensor, Tensor]:
    """Student's and teacher's log-probabilities [n, K] of the `k` likeliest tokens of the teacher, student, or either.

    `rest` is what becomes of the others' mass: `dropped` (log-probabilities stay those of the whole vocabulary),
    `renormalised` (each side sums to 1 on what is kept), `teacher_renormalised` (only the teacher does), or `tail` (one
    more entry, the log of the mass that is left). A `k` of the whole vocabulary or more changes nothing, exactly.
    """
    if k >= s_nV.shape[-1]:
        return s_nV, t_nV
    with torch.no_grad():
        if whose == "union":
            ids_nK, again_nK = _either(s_nV, t_nV, k)
        else:
            ids_nK, again_nK = (s_nV if whose == "student" else t_nV).topk(k, -1).indices, None
    kept = [x_nV.gather(-1, ids_nK) for x_nV in (s_nV, t_nV)]
    if again_nK is not None:
        kept = [x_nK.masked_fill(again_nK, NOWHERE) for x_nK in kept]
    s_nK, t_nK = kept
    return close(s_nK, t_nK, rest)


def top(logp_nV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids of the `k` likeliest tokens [n, K] and their log-probabilities; of all of them, in their own order."""
    if k >= logp_nV.shape[-1]:
        return torch.arange(logp_nV.shape[-1], device=logp_nV.device).expand(logp_nV.shape), logp_nV
    logp_nK, ids_nK = logp_nV.topk(k, -1)
    return ids_nK, logp_nK


def cut_at(s_nV: Tensor, ids_nK: Tensor, t_nK: Tensor, rest: Rest) -> tuple[Tensor, Tensor]:
    """As `cut`, where of the teacher only its likeliest tokens are known: their ids and log-probabilities."""
    s_nK = s_nV.gather(-1, ids_nK)
    return (s_nK, t_nK) if t_nK.shape[-1] >= s_nV.shape[-1] else close(s_nK, t_nK, rest)


def close(s_nK: Tensor, t_nK: Tensor, rest: Rest) -> tuple[Tensor, Tensor]:
    """Both sides on what is kept, with what `rest` makes of the others' mass."""
    match rest:
        case "dropped":
            return s_nK, t_nK
        case "renormalised":
            return s_nK.log_softmax(-1), t_nK.log_softmax(-1)
        case "teacher_renormalised":
            return s_nK, t_nK.log_softmax(-1)
        case "tail":
            return _with_tail(s_nK), _with_tail(t_nK)


def _either(s_nV: Tensor, t_nV: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ids of both sides' top k side by side [n, 2k], and where one of them stands for the second time."""
    own_nk, other_nk = s_nV.topk(k, -1).indices, t_nV.topk(k, -1).indices
    held_nV = torch.zeros_like(s_nV, dtype=torch.bool).scatter(-1, own_nk, True)
    again_nk = held_nV.gather(-1, other_nk)
    return torch.cat([own_nk, other_nk], -1), torch.cat([torch.zeros_like(again_nk), again_nk], -1)


def _with_tail(logp_nK: Tensor) -> Tensor:
    """One entry more: log(1 - what is kept), which rounding cannot make the log of 0."""
    kept_n1 = logp_nK.logsumexp(-1, keepdim=True).clamp(max=-LEAST)
    return torch.cat([logp_nK, (-torch.expm1(kept_n1)).log()], -1)
