"""MiniLLM: the reverse KL of whole sequences, on samples that the teacher has a hand in."""

from __future__ import annotations

from typing import Literal

from opd.anchors import old
from opd.credits import bounded, discounted, future, log_ratio, per_remaining, whitened
from opd.divergences import Divergence
from opd.gates import importance
from opd.loss import Per, match, nll, push
from opd.method import TEACHER, Clip, Coefficient, Group, Method, Share, both, one


def minillm(
    *,
    alpha: Share = 0.2,
    length_norm: bool = True,
    clip: Clip = (0.2, 0.2),
    pretrain: Coefficient = 1.0,
    form: Literal["paper", "official"] = "paper",
    group: Group = 1,
    per: Per = "token",
) -> Method:
    """Reverse KL of whole answers: this token's divergence over the vocabulary, and what its sample leads to.

    Speaks: student, each token sampled from alpha * teacher + (1 - alpha) * student; and data, when `pretrain` is not
    0. Judge: teacher; says DENSE.
    Loss: mean over tokens of w_t [KL(pi_t || teacher_t) - min(r R, clip(r) R)], r = pi / pi_old, w_t = pi_old / (what
    sampled the token), R_t the mean of log teacher - log pi_old over the tokens *after* t (their sum with `length_norm:
    false`); plus `pretrain` times the cross entropy on the data's answers. `form: official` is what the authors' code
    minimises: R_t includes t, is discounted by 0.95, divided by the tokens left and whitened over the batch, its
    rewards doubled and held in +-100; w_t stands inside the clip, not on the divergence; the pretraining loss is half
    cross entropy, half forward KL.
    Gradient: through the distribution at each token and through log pi of the sampled one. On-policy (alpha 0), per
    sequence_sum and without `length_norm` its expectation is the exact gradient of the sequences' reverse KL. With a
    blend only the product of w over the whole answer would be unbiased; the paper takes the one factor w_t instead.
    Source: MiniLLM, arXiv 2306.08543, eq. 4-9 and algorithm 1; LMOps `minillm/losses.py` for the official form.
    Differs from the paper in: the mean over tokens (`per: sequence_sum` is its sum), which rescales the learning rate;
    the pretraining loss is on the answers that the data records for the same prompts, not on documents of a corpus;
    the code whitens padding too, here only tokens count.
    """
    ratio, kl = log_ratio(TEACHER, "old"), match(TEACHER, Divergence("reverse_kl"))
    if form == "paper":
        long = push(future(ratio, mean=length_norm), anchor=old(), clip=clip)
        loss, corpus = (kl + long).where(importance()), nll()
    else:
        if not length_norm:
            raise ValueError("the official code always divides by the tokens that are left: length_norm: false is none")
        returns = per_remaining(discounted(bounded(2 * ratio, -100, 100), 0.95))
        loss = kl + push(whitened(returns), clip=clip)
        corpus = 0.5 * (nll() + match(TEACHER, Divergence("forward_kl")))
    loss = loss.per(per).on("student") + pretrain * corpus.on("data")
    speaks = both("student", "data") if pretrain != 0 else one("student")
    return Method(speaks=speaks.blended("teacher", alpha), loss=loss, group=group)
