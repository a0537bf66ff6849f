"""GRPO with a KL to a teacher added: the plain way to have both a verifier and a teacher."""

from __future__ import annotations

from opd.anchors import live
from opd.credits import log_ratio
from opd.gates import failed
from opd.loss import Per, push
from opd.method import TEACHER, Clip, Coefficient, Group, Method, NotNegative, one
from opd.methods.grpo import grpo
from opd.schedule import linear

ANNEALED = linear(0.005, 0.001, 80)


def kdrl(
    *,
    beta: Coefficient = ANNEALED,
    spare_correct: bool = False,
    success: float = 0.0,
    group: Group = 8,
    clip: Clip = (0.2, 0.2),
    std: bool = True,
    min_std: NotNegative = 0.0,
    per: Per = "token",
) -> Method:
    """Follow the reward as GRPO does, and the teacher by `beta` times the reverse KL on the same samples.

    Speaks: student, `group` samples a prompt. Judge: teacher; says TOKEN. Reads the task's reward.
    Loss: GRPO's, plus `beta` times mean over tokens of -[log teacher - log student] of the sampled token, now.
    `spare_correct` leaves rows whose reward is above `success` to the reward alone; they still count in the mean. At
    beta 0 it is GRPO with the same arguments, and the teacher is not asked.
    Gradient: of the second term beta (log student - log teacher) grad log student: that of the k2 estimate, whose mean
    over the student's samples is the reverse KL's exactly. The value that is shown is k1's, the KL itself.
    Source: KDRL, arXiv 2506.02208: k2 rather than k3, beta annealed to a floor, reward-guided masking.
    Differs from the paper in: its ends of beta, 0.005 and 0.001, are from a review of it, and that it takes 80 steps is
    ours; the mask is of whole responses.
    """
    student = grpo(group=group, clip=clip, std=std, min_std=min_std, per=per)
    pull = push(log_ratio(TEACHER, "live"), anchor=live())
    if spare_correct:
        pull = pull.where(failed(success))
    return Method(speaks=one("student"), loss=student.loss + beta * pull.per(per), group=group, goal="reward")
