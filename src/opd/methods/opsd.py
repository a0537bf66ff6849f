"""On-policy self-distillation: the teacher is the same model that also sees the answer."""

from __future__ import annotations

from typing import Literal

from opd.divergences import Divergence
from opd.loss import Per, match
from opd.method import Method, Positive, Share, one
from opd.types import Judge


def opsd(
    *,
    teacher: Literal["reference", "ema", "student"] = "reference",
    divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl",
    beta: Share = 0.5,
    cap: Positive | None = None,
    temperature: Positive = 1.0,
    decay: Share = 0.999,
    per: Per = "sequence",
) -> Method:
    """The student reads the question; the same model, which also reads a reference solution, says how to go on.

    Speaks: student. Judge: `teacher` in the view `answer` (frozen at stage start: `reference`; a running mean that
    keeps `decay` of itself each step: `ema`; the student of the moment: `student`); says DENSE.
    Loss: mean over rollouts of the mean over tokens of sum_v min(l_v, cap), l_v the entries of the divergence
    (p_v log(p_v / q_v) for `forward_kl`), in nats; `cap: null` does not clip.
    Gradient: through the student's distribution; a clipped entry gives none. With forward KL that is, for logit j,
    q_j sum of the unclipped p_v less p_j where j is unclipped.
    Source: OPSD, arXiv 2601.18734 (v3), with its tau = 0.05 as `cap`.
    Differs from the paper in: no clip by default. Clipped, the sum is no divergence any more: it can be negative, and
    is lowest where the student gives *more* to tokens the teacher finds unlikely than the teacher does (docs/sparse.md
    has the numbers), so it stabilises a run that style tokens dominate and does not converge to the teacher.
    """
    args = (("beta", beta),) if divergence == "jsd" else ()
    judge = Judge(teacher, "answer")
    loss = match(judge, Divergence(divergence, args, temperature, cap=cap)).per(per)
    return Method(speaks=one("student"), loss=loss, ema=decay if teacher == "ema" else None)
