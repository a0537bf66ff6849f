"""Distillation at the frontier of what the student can do: prompts weighed by how often it succeeds."""

from __future__ import annotations

from typing import Literal

from opd.divergences import Divergence
from opd.gates import pass_rate
from opd.loss import Per, match
from opd.method import TEACHER, Group, Method, NotNegative, one


def paced(
    *,
    divergence: Literal["forward_kl", "reverse_kl"] = "forward_kl",
    a: NotNegative = 1.0,
    b: NotNegative = 1.0,
    success: float = 0.0,
    group: Group = 8,
    per: Per = "sequence",
) -> Method:
    """A divergence to the teacher on the student's samples, most on prompts that the student half knows.

    Speaks: student, `group` samples a prompt. Judge: teacher; says DENSE. Reads the task's reward.
    Loss: mean over rollouts of p^a (1 - p)^b times the mean over tokens of D(teacher_t, student_t), p the share of the
    prompt's samples whose reward is above `success`. The weight is 0 where p is 0 or 1 and highest at a / (a + b); with
    a = b = 0 every prompt weighs 1. D is KL(teacher || student) or KL(student || teacher); the paper's two stages,
    forward then reverse, are two stages of a recipe.
    Gradient: through the student's distribution at the sampled positions; none through p.
    Source: PACED, arXiv 2603.11178.
    Differs from the paper in: weights are not normalised to a mean of 1 (no constant is known), so steps with few such
    prompts are smaller; p is measured on the very samples that teach.
    """
    loss = match(TEACHER, Divergence(divergence)).where(pass_rate(a, b, success)).per(per)
    return Method(speaks=one("student"), loss=loss, group=group)
