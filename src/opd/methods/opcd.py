"""On-policy context distillation: the teacher reads a context that the student will not have."""

from __future__ import annotations

from opd.divergences import Divergence, Support
from opd.loss import Per, match
from opd.method import Group, Method, Positive, one
from opd.types import Judge


def opcd(
    *,
    teacher: str = "reference",
    top_k: Group | None = 256,
    temperature: Positive = 1.0,
    per: Per = "sequence",
) -> Method:
    """What a system prompt or an extracted experience taught is moved into the weights, on samples made without it.

    Speaks: student, without the context. Judge: `teacher` (`reference`, the student at stage start, or a larger
    model's role) in the view `context`; says DENSE.
    Loss: mean over rollouts of the mean over tokens of sum over v in K of q_v (log q_v - log p_v), in nats, K the
    student's `top_k` likeliest tokens, neither side renormalised; `top_k: null` is the exact KL(student || teacher).
    Gradient: through q. On a small K it also pushes mass out of K (docs/sparse.md); with 256 chosen anew at each step
    that is next to nothing.
    Source: OPCD, arXiv 2602.12275; top 256 of the student is its code's `kl_topk`.
    Differs from the paper in: nothing in the paper's mean over each answer's tokens; its code takes the mean over all
    tokens (`per: token`).
    """
    support = None if top_k is None else Support("student", top_k, "dropped")
    divergence = Divergence("reverse_kl", temperature=temperature, support=support)
    return Method(speaks=one("student"), loss=match(Judge(teacher, "context"), divergence).per(per))
