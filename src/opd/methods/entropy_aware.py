"""Entropy-aware on-policy distillation: sampled tokens, and the teacher's head where it is unsure."""

from __future__ import annotations

from opd.anchors import old
from opd.credits import log_ratio
from opd.divergences import eopd
from opd.gates import unsure
from opd.loss import Per, match, push
from opd.method import TEACHER, Clip, Group, Method, NotNegative, one


def entropy_aware(
    *,
    unsure_nats: float = 0.8,
    forward: NotNegative = 1.0,
    top_k: Group = 16,
    clip: Clip = (0.2, 0.2),
    group: Group = 1,
    per: Per = "token",
) -> Method:
    """Sampled-token distillation, and where the teacher is unsure also the forward KL to its likeliest tokens.

    Speaks: student. Judge: teacher; says DENSE.
    Loss: -mean over tokens of min(r A, clip(r) A), r = pi / pi_old, A = log teacher - log pi_old; plus `forward` times
    the mean over all tokens of [H(teacher_t) > unsure_nats] sum over the teacher's top k of p log(p / q), p
    renormalised on them and q not, in nats. The gate is hard, its entropy that of the whole distribution at temperature
    1. At infinite `unsure_nats` or `forward` 0 this is sampled-token distillation; below 0 nats the forward KL is
    everywhere.
    Gradient: through log pi of the sampled token, and through the student's distribution where the gate is open. The
    forward part alone would end at p renormalised on the top k and nothing elsewhere (docs/sparse.md).
    Source: EOPD, arXiv 2603.07079: 0.8 nats (open at 15 to 20 % of the tokens), top 16, clip 0.2.
    Differs from the paper in: the group is free and only prompt reuse.
    """
    pushed = push(log_ratio(TEACHER, "old"), anchor=old(), clip=clip)
    pulled = match(TEACHER, eopd(top_k)).where(unsure(TEACHER, unsure_nats))
    return Method(speaks=one("student"), loss=(pushed + forward * pulled).per(per), group=group)
