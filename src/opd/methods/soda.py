"""Preference optimisation against one snapshot of the student: a cheap rival of adversarial distillation."""

from __future__ import annotations

from opd.anchors import live
from opd.credits import preference
from opd.loss import push
from opd.method import REFERENCE, Method, Positive, both


def soda(*, beta: Positive = 0.1) -> Method:
    """Prefer the teacher's answer to the answer that the student gave when the stage began (DPO).

    Speaks: teacher and reference, a row each for every prompt; the reference is the student at stage start, and
    answers each prompt once, at temperature 1. Judge: reference; says TOKEN.
    Loss: mean over prompts of -log sigmoid(z), z = beta [log pi/ref (teacher's answer) - log pi/ref (reference's
    answer)], log pi/ref summed over the answer's tokens, at `speak.temperature`.
    Gradient: exactly that of the loss, as a push: a token of the teacher's answer has the credit +beta sigmoid(-z), of
    the reference's -beta sigmoid(-z), times the gradient of log pi. At beta = 1 its fixed point is the teacher; below,
    the teacher sharpened against the reference, ref (teacher / ref)^(1 / beta).
    Source: SODA, arXiv 2604.03873, "semi on-policy": the rejected answers are a static snapshot; DPO, arXiv 2305.18290,
    eq. 7.
    Differs from the paper in: the snapshot is sampled when a prompt is first met, not in a pass of its own (the same
    answers, because the reference stands still). Its beta is not known to us; 0.1 is DPO's.
    """
    credit = preference("teacher", "reference", REFERENCE, beta=beta)
    loss = push(credit, anchor=live()).per("sequence_sum")
    return Method(speaks=both("teacher", "reference"), loss=loss.on("teacher") + loss.on("reference"), goal="text")
