"""Learning from what came next: a hint drawn from the next turn, shown to the teacher alone."""

from __future__ import annotations

from opd.anchors import old
from opd.credits import log_ratio, outcome
from opd.gates import heard
from opd.loss import Per, push
from opd.method import Clip, Coefficient, Group, Method, one
from opd.methods.grpo import to_reference
from opd.types import Judge


def hindsight(
    *,
    distil: Coefficient = 1.0,
    binary: Coefficient = 1.0,
    clip: Clip = (0.2, 0.28),
    kl: Coefficient = 0.0,
    group: Group = 1,
    per: Per = "sequence",
) -> Method:
    """Each token is moved by how much likelier it is to the same model that also reads the hint, and by the reward.

    Speaks: student, the policy in use. Judge: `student` in the view `hint`; says TOKEN (not where there is no hint).
    Loss: -mean over rollouts of the mean over tokens of min(r A, clip(r) A), r = pi / pi_old,
    A_t = `binary` * reward + `distil` * (log pi(y_t | prompt with hint) - log pi_old(y_t)), the second part 0 where no
    hint was found. The reward is used as it is (+1, 0 or -1 in the paper), without a group. `kl` times the KL to the
    student at stage start.
    Gradient: through log pi of the sampled token; the hinted judgement carries none.
    Source: OpenClaw-RL (2026), hint-guided on-policy distillation and its combination with binary rewards.
    Differs from the paper in: a rollout without a hint is marked so, and gets no distillation credit (the code pads
    missing log-probabilities with 0, a large advantage); the judge reads the sampled tokens, not text tokenised anew;
    KL 0 by default (paper 0.02, its scripts 0 or 0.01). `binary: 0` reads no reward, `distil: 0` needs no hints.
    """
    judge = Judge("student", "hint")
    credit = binary * outcome() + distil * log_ratio(judge, "old").where(heard(judge))
    loss = push(credit, anchor=old(), clip=clip) + to_reference(kl, "push")
    return Method(speaks=one("student"), loss=loss.per(per), group=group)
