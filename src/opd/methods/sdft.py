"""Self-distillation fine-tuning: the same model with a demonstration in its context teaches itself without."""

from __future__ import annotations

from typing import Literal

from opd.divergences import sdft as divergence
from opd.gates import truncated
from opd.loss import Per, match
from opd.method import Count, Method, Positive, Share, one
from opd.types import Judge


def sdft(
    *,
    teacher: Literal["reference", "ema", "student"] = "ema",
    alpha: Share = 0.5,
    top_k: Count = 100,
    tail: bool = True,
    clip: Positive | None = 2.0,
    decay: Share = 0.99,
    per: Per = "sequence",
) -> Method:
    """Demonstrations are learned on-policy: the model that has seen one judges the samples of the one that has not.

    Speaks: student. Judge: `teacher` in the view `demonstration`, which shows a recorded response (`ema`: a running
    mean of the student that keeps `decay` of itself each step; `reference`: the student at stage start; `student`);
    says DENSE.
    Loss: mean over rollouts of the mean over tokens of min(pi / pi_old, clip) JSD_alpha(teacher, student), in nats, on
    the student's `top_k` likeliest tokens and (`tail`) one bucket for the rest; alpha 0 is forward KL, 1 reverse KL;
    `clip: null` leaves the weight out.
    Gradient: through the student's distribution; not through the weight. With one update a batch the weight is 1.
    Source: SDFT, arXiv 2601.19897, in the form of TRL's trainer (alpha 0.5, top 100, weight clipped at 2).
    Differs from the paper in: `tail` is on by default, so that the optimum is the teacher (docs/sparse.md); the first
    tokens of an answer are not skipped (a recipe of the Tinker cookbook leaves out three).
    """
    loss = match(Judge(teacher, "demonstration"), divergence(alpha, top_k, tail=tail)).per(per)
    if clip is not None:
        loss = loss.where(truncated(clip))
    return Method(speaks=one("student"), loss=loss, ema=decay if teacher == "ema" else None)
