"""Generalized knowledge distillation: a divergence on the student's own samples, on data, or on both."""

from __future__ import annotations

from typing import Literal

from opd.divergences import Divergence
from opd.loss import Per, match
from opd.method import TEACHER, Method, Positive, Share, mixture

Name = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]


def gkd(
    *,
    on_policy: Share = 0.5,
    divergence: Name = "jsd",
    beta: Share = 0.5,
    alpha: Share = 0.1,
    temperature: Positive = 1.0,
    per: Per = "sequence",
) -> Method:
    """A full-vocabulary divergence between teacher and student, token by token, without gradient through the sampling.

    Speaks: student on a share `on_policy` of the prompts, data on the rest. Judge: teacher; says DENSE.
    Loss: mean over rollouts of the mean over tokens of D(teacher_t, student_t), in nats. `divergence` is KL(p||q)
    `forward_kl`, KL(q||p) `reverse_kl`, `jsd` with `beta`, `skew_forward_kl` and `skew_reverse_kl` with `alpha`, or
    `tvd`; `temperature` divides both sides' logits (no tau^2 factor).
    Gradient: through the student's distribution at the sampled positions.
    Source: GKD, arXiv 2306.13649, algorithm 1 and eq. 1; DistiLLM, arXiv 2402.03898, for the skewed ones.
    Differs from the paper in: the mixture of speakers is exact over the run, not a coin a step; `beta` 0 and 1 are
    refused by name (use forward_kl, reverse_kl), because the unscaled JSD vanishes there, and so is `alpha` 1.
    """
    args: dict[str, tuple[tuple[str, float], ...]] = {
        "jsd": (("beta", beta),),
        "skew_forward_kl": (("alpha", alpha),),
        "skew_reverse_kl": (("alpha", alpha),),
    }
    if divergence == "jsd" and beta in (0.0, 1.0):
        limit = "forward_kl" if beta == 0 else "reverse_kl"
        raise ValueError(f"jsd with beta = {beta:g} is zero everywhere; its limit per unit is {limit}: name that")
    if divergence.startswith("skew") and alpha == 1:
        raise ValueError(f"{divergence} with alpha = 1 is zero everywhere: choose a share below 1")
    chosen = Divergence(divergence, args.get(divergence, ()), temperature)
    return Method(speaks=mixture(student=on_policy, data=1 - on_policy), loss=match(TEACHER, chosen).per(per))
