"""Trust-region ratio distillation: the teacher stands in the ratio's denominator."""

from __future__ import annotations

from typing import Literal

from opd.anchors import blend
from opd.credits import reward
from opd.loss import Per, push
from opd.method import TEACHER, Clip, Coefficient, Group, Method, NotNegative, Positive, Share, one
from opd.methods.grpo import to_reference


def rlad(
    *,
    alpha: Share = 0.5,
    clamp: Positive | None = None,
    group: Group = 8,
    clip: Clip = (0.2, 0.28),
    std: bool = True,
    min_std: NotNegative = 0.0,
    kl: Coefficient = 0.0,
    kl_form: Literal["push", "k3"] = "push",
    per: Per = "sequence",
) -> Method:
    """The reward says which way, the teacher how far: the trust region lies between the old student and the teacher.

    Speaks: student, `group` samples a prompt. Judge: teacher; says TOKEN. Reads the task's reward; `reference` says
    TOKEN when kl > 0.
    Loss: GRPO's with r = student / (old^alpha teacher^(1 - alpha)), so -mean of min(r A, clip(r) A), A = (reward -
    group mean) / (group std + 1e-6). alpha 1 is GRPO with the same arguments, to the bit, and the teacher is not asked;
    alpha 0 has the teacher alone as anchor. r is not 1 at the first update, so the clip acts from the start: a good
    token that is already far above the teacher is not raised, a bad one far below it not lowered. Where rewards tie
    nothing is learned, from the teacher neither.
    Gradient: r A grad log student. `clamp` (the paper's stabiliser, 1) holds log student - log teacher in [-clamp,
    clamp] inside r; where it holds, the teacher's part of r stands still and the gradient is alpha r A grad log
    student: half at alpha 0.5, and none at alpha 0.
    Source: RLAD, arXiv 2602.22495, eq. 3 and appendix B (section 4.1 has the ends of alpha the wrong way round).
    Differs from the paper in: `clamp` is off unless asked for; the weight of the KL to the reference is not disclosed,
    and 0 here.
    """
    loss = push(reward(std=std, min_std=min_std), anchor=blend(TEACHER, alpha, clamp), clip=clip)
    return Method(speaks=one("student"), loss=(loss + to_reference(kl, kl_form)).per(per), group=group, goal="reward")
