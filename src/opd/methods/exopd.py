"""Generalized on-policy distillation: beyond the teacher, along the way from a reference to it."""

from __future__ import annotations

from opd.anchors import Against, old
from opd.credits import log_ratio
from opd.loss import Per, push
from opd.method import TEACHER, Clip, Group, Method, NotNegative, one
from opd.types import Judge


def exopd(
    *,
    lam: NotNegative = 1.25,
    reference: str = "reference",
    against: Against = "behaviour",
    group: Group = 1,
    clip: Clip = None,
    per: Per = "token",
) -> Method:
    """Take what the teacher changed against a reference as the reward, and more of it than the teacher did.

    Speaks: student. Judges: teacher and `reference`; both say TOKEN. `reference` is the student at stage start, or a
    role of the recipe's: the teacher's own base, where it is known ("reward correction").
    Loss: -mean over tokens of exp(log student - log anchor) A_t, A_t = lam [log teacher - log student] + (1 - lam) [log
    reference - log student], which is the negative of the paper's cost (log student - log teacher) + (lam - 1) (log
    reference - log teacher). `against` and the anchor are as in token_opd. lam 1 is token_opd for any reference, lam 0
    stays at the reference.
    Gradient: through log student of the sampled token; on-policy, in expectation and token by token that of KL(student
    || teacher^lam reference^(1 - lam)), so the student comes to that product, normalised.
    Source: G-OPD, arXiv 2602.12125 (its eq. 14 prints the gradient of the loss). lam 1.25 is its ExOPD; 1.5 was
    unstable.
    Differs from the paper in: the mean over tokens.
    """
    credit = lam * log_ratio(TEACHER, against) + (1 - lam) * log_ratio(Judge(reference), against)
    anchor = old() if against == "old" else None
    return Method(speaks=one("student"), loss=push(credit, anchor=anchor, clip=clip).per(per), group=group)
