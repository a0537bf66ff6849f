"""Group-relative policy optimisation on a verifiable reward: the baseline all others are held against."""

from __future__ import annotations

from typing import Literal

from opd.anchors import old
from opd.credits import log_ratio, reward
from opd.loss import Loss, Per, k3, push
from opd.method import REFERENCE, Clip, Coefficient, Group, Method, NotNegative, one


def grpo(
    *,
    group: Group = 8,
    clip: Clip = (0.2, 0.2),
    std: bool = True,
    min_std: NotNegative = 0.0,
    kl: Coefficient = 0.0,
    kl_form: Literal["push", "k3"] = "push",
    per: Per = "token",
) -> Method:
    """Raise the samples of a prompt that earned more than their group, lower the others.

    Speaks: student, `group` samples a prompt. Judge: none (the task's reward); `reference` says TOKEN when kl > 0.
    Loss: -mean over tokens of min(r A, clip(r) A), r = pi / pi_old, A = (reward - group mean) / (group std + 1e-6)
    (`std=False`: without the division), plus `kl` times the KL to the student at stage start. A group whose rewards
    differ by no more than `min_std` gets no credit and is counted.
    Gradient: through log pi of the sampled token; with one update a batch r = 1 and the clip never acts.
    Source: DeepSeekMath, arXiv 2402.03300, eq. 3; DAPO, arXiv 2503.14476, for the token mean and a clip of two
    sides.
    Differs from the paper in: `kl_form: push` has the gradient of KL(student || reference); the paper's k3 penalty
    has the forward one's.
    """
    loss = push(reward(std=std, min_std=min_std), anchor=old(), clip=clip)
    return Method(speaks=one("student"), loss=(loss + to_reference(kl, kl_form)).per(per), group=group, goal="reward")


def to_reference(kl: Coefficient, form: Literal["push", "k3"]) -> Loss:
    """`kl` times the KL to the reference, as a credit (reverse gradient) or as the papers' k3 penalty."""
    return kl * (k3(REFERENCE) if form == "k3" else push(log_ratio(REFERENCE, "live"), anchor=old()))
