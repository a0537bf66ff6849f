"""How far two next-token distributions agree on what is likely: what Rethinking OPD (arXiv 2604.13016) looks at.

Natural-log probabilities `s_nV` (student) and `t_nV` (teacher), normalised over V; no gradient is meant to flow.

Shapes: n tokens, V vocabulary, K the student's likeliest tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

TOP = 16  # of Rethinking OPD


class Overlap(NamedTuple):
    """Of I, the tokens that are among the k likeliest of both.

    `ratio_n` |I| / k. `student_mass_n`, `teacher_mass_n` what each gives to I. `advantage_n` the mean over I of
    p (log q - log p), p student and q teacher renormalised on I: -KL / |I|, never above 0; nan where I is empty.
    """

    ratio_n: Tensor
    advantage_n: Tensor
    student_mass_n: Tensor
    teacher_mass_n: Tensor


def overlap(s_nV: Tensor, t_nV: Tensor, k: int = TOP) -> Overlap:
    """What the two sides' `k` likeliest tokens (of V, where that is fewer) have in common.

    A token as likely to the teacher as its k-th counts as one of its k; one without probability on either side never.
    """
    k = min(k, s_nV.shape[-1])
    s_nK, at_nK = s_nV.topk(k, -1, sorted=False)
    t_nK, least_n1 = t_nV.gather(-1, at_nK), t_nV.topk(k, -1).values[:, -1:]
    both_nK = (t_nK >= least_n1) & ~s_nK.isneginf() & ~t_nK.isneginf()
    size_n = both_nK.sum(-1)
    s_nK, t_nK = (x_nK.masked_fill(~both_nK, -torch.inf) for x_nK in (s_nK, t_nK))
    inside_nK = (t_nK.log_softmax(-1) - s_nK.log_softmax(-1)).masked_fill(~both_nK, 0.0)
    gained_n = (s_nK.softmax(-1) * inside_nK).sum(-1)  # 0 / 0 where I is empty
    return Overlap(size_n.to(s_nV.dtype) / k, gained_n / size_n, s_nK.exp().sum(-1), t_nK.exp().sum(-1))
