"""Self-distilled reinforcement learning: the verifier gives the credit its sign, a better informed self its size."""

from __future__ import annotations

from typing import Literal

from opd.anchors import old
from opd.credits import evident, log_ratio, reward
from opd.loss import Per, push
from opd.method import Clip, Coefficient, Group, Method, NotNegative, Share, one
from opd.methods.grpo import to_reference
from opd.schedule import linear
from opd.types import Judge

FADING = linear(0.5, 0.0, 50)


def rlsd(
    *,
    lam: Coefficient = FADING,
    eps: Share = 0.2,
    role: Literal["reference", "ema", "student"] = "reference",
    ema: Share = 0.999,
    group: Group = 8,
    clip: Clip = (0.2, 0.2),
    std: bool = True,
    min_std: NotNegative = 0.0,
    kl: Coefficient = 0.0,
    kl_form: Literal["push", "k3"] = "push",
    per: Per = "token",
) -> Method:
    """GRPO whose credit is shared out among a row's tokens by how much likelier knowing the answer makes them.

    Speaks: student, `group` samples a prompt. Judge: the same model that also sees the answer; says TOKEN. `role` is
    whose weights: the student at stage start, its running mean (of which `ema` stays at each step), or as it is. Reads
    the task's reward.
    Loss: GRPO's with the credit A_t = A [(1 - lam) + lam clip(exp(sign(A) D_t), 1 - eps, 1 + eps)], D_t = log judge(y_t
    | with the answer) - log student(y_t). A_t has the sign of A and differs from it by at most lam eps of it, so what
    the judge knows and the student cannot know is never imitated, only weighed. With lam the number 0 it is GRPO with
    the same arguments, to the bit, and no judge is asked.
    Gradient: through log student of the sampled token; none through D_t.
    Source: RLSD, arXiv 2604.03128.
    Differs from the paper in: its schedule of lam, 0.5 to 0 over about 50 steps, is known from others' implementations
    alone.
    """
    credit = evident(reward(std=std, min_std=min_std), log_ratio(Judge(role, "answer"), "live"), lam, eps)
    loss = push(credit, anchor=old(), clip=clip)
    kept = ema if role == "ema" else None
    loss = (loss + to_reference(kl, kl_form)).per(per)
    return Method(speaks=one("student"), loss=loss, group=group, goal="reward", ema=kept)
