"""DistiLLM: skewed divergences, one kind for what the teacher said and another for what the student said."""

from __future__ import annotations

from typing import Literal

from opd.divergences import Divergence
from opd.loss import Per, match
from opd.method import TEACHER, Coefficient, Group, Method, Share, both, student_or_data


def distillm(
    *,
    form: Literal["contrastive", "skew_forward_kl", "skew_reverse_kl"] = "contrastive",
    alpha: Share = 0.1,
    on_policy: Coefficient = 0.5,
    group: Group = 1,
    per: Per = "token",
) -> Method:
    """Pull the student up where the teacher speaks and down where it speaks itself, by divergences that stay finite.

    Speaks: teacher and student, for every prompt (`contrastive`); in the other forms the student on a share `on_policy`
    of the prompts, which may be a schedule, and data on the rest. Judge: teacher; says DENSE.
    Loss: `contrastive` (DistiLLM-2): half the mean over the teacher's tokens of KL(p || alpha p + (1 - alpha) q), plus
    half the mean over the student's of KL(q || (1 - alpha) p + alpha q); p is the teacher, q the student.
    `skew_forward_kl` and `skew_reverse_kl` (DistiLLM): the first or the second over all rows. In nats, at temperature
    1.
    Gradient: through q wherever it stands, also in the mixture; not through the sampling.
    Source: DistiLLM, arXiv 2402.03898, and its code; DistiLLM-2, arXiv 2503.07067.
    Differs from the paper in: `alpha` stands still (DistiLLM-2 fits it to each sequence's probabilities and shifts the
    weights of the two halves); `on_policy` follows a schedule, where DistiLLM watches the validation loss; student
    rows are always new, without a replay buffer; the reverse mixture is not detached, as in DistiLLM and unlike
    DistiLLM-2's code.
    """
    if alpha == 1:
        raise ValueError("a skew of alpha = 1 compares a distribution with itself: choose a share below 1")
    forward, reverse = (
        match(TEACHER, Divergence(name, (("alpha", alpha),))) for name in ("skew_forward_kl", "skew_reverse_kl")
    )
    if form != "contrastive":
        chosen = forward if form == "skew_forward_kl" else reverse
        return Method(speaks=student_or_data(on_policy), loss=chosen.per(per), group=group)
    loss = 0.5 * forward.on("teacher") + 0.5 * reverse.on("student")
    return Method(speaks=both("teacher", "student"), loss=loss.per(per), group=group)
