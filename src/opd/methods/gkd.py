"""Generalized knowledge distillation: a divergence on the student's own samples, on data, or on both."""

from __future__ import annotations

from typing import Literal

from opd.divergences import Divergence, Rest, Support, Whose
from opd.loss import Per, match
from opd.method import TEACHER, Count, Method, Positive, Share, mixture

Direct = Literal["forward_kl", "reverse_kl", "jsd", "skew_forward_kl", "skew_reverse_kl", "tvd"]
More = Literal["alpha_divergence", "adaptive_kl", "jeffreys", "hellinger", "pearson", "neyman"]


def gkd(
    *,
    on_policy: Share = 0.5,
    divergence: Direct | More = "jsd",
    beta: Share = 0.5,
    scaled: bool = False,
    alpha: Share = 0.1,
    mu: Share = 0.5,
    temperature: Positive = 1.0,
    cap: Positive | None = None,
    top_k: Count = 0,
    whose: Whose = "teacher",
    rest: Rest = "tail",
    per: Per = "sequence",
) -> Method:
    """A divergence between teacher and student, token by token, without gradient through the sampling.

    Speaks: student on a share `on_policy` of the prompts, data on the rest. Judge: teacher; says DENSE.
    Loss: mean over rollouts of the mean over tokens of D(teacher_t, student_t), in nats. `divergence` is KL(p||q)
    `forward_kl`, KL(q||p) `reverse_kl`, their sum `jeffreys`, `jsd` with `beta`, `skew_forward_kl` and
    `skew_reverse_kl` with `alpha`, `tvd`, `hellinger`, the chi-squares `pearson` and `neyman`, `alpha_divergence` with
    `alpha` (0 reverse, 1 forward), or `adaptive_kl` with `mu`, the teacher's mass that is its head. `scaled` divides
    the jsd by beta (1 - beta): it is then forward_kl at 0, reverse_kl at 1, and of their size between. `temperature`
    divides both sides' logits (no tau^2 factor); `cap` bounds every vocabulary entry from above. `top_k` above 0 sums
    over as many tokens of `whose` ranking, and `rest` says what becomes of the others: that is another objective, and
    only the `tail` has the teacher as its optimum (docs/sparse.md).
    Gradient: through the student's distribution at the sampled positions.
    Source: GKD, arXiv 2306.13649, algorithm 1 and eq. 1; DistiLLM, arXiv 2402.03898, for the skewed ones; AKL, arXiv
    2404.02657, for the adaptive one; OPSD, arXiv 2601.18734, for the cap.
    Differs from the paper in: the mixture of speakers is exact over the run, not a coin a step; unscaled `beta` 0 and 1
    are refused by name (use forward_kl, reverse_kl), because the JSD vanishes there, and so is a skew of 1.
    """
    if divergence == "jsd" and beta in (0.0, 1.0) and not scaled:
        limit = "forward_kl" if beta == 0 else "reverse_kl"
        raise ValueError(f"jsd with beta = {beta:g} is zero everywhere; its limit per unit is {limit}: name that")
    if scaled and divergence != "jsd":
        raise ValueError(f"scaled is an argument of jsd, and the divergence is {divergence}: leave it out")
    if divergence.startswith("skew") and alpha == 1:
        raise ValueError(f"{divergence} with alpha = 1 is zero everywhere: choose a share below 1")
    args: dict[str, tuple[tuple[str, float | str], ...]] = {
        "jsd": (("beta", beta), ("scaled", scaled)),
        "skew_forward_kl": (("alpha", alpha),),
        "skew_reverse_kl": (("alpha", alpha),),
        "alpha_divergence": (("alpha", alpha),),
        "adaptive_kl": (("mu", mu),),
    }
    by_generator = divergence in ("jeffreys", "hellinger", "pearson", "neyman")
    chosen = Divergence(
        "f_divergence" if by_generator else divergence,
        (("generator", divergence),) if by_generator else args.get(divergence, ()),
        temperature,
        support=Support(whose, top_k, rest) if top_k else None,
        cap=cap,
    )
    return Method(speaks=mixture(student=on_policy, data=1 - on_policy), loss=match(TEACHER, chosen).per(per))
