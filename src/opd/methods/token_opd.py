"""On-policy distillation from the log-probability of the sampled token alone."""

from __future__ import annotations

from opd.anchors import Against, old
from opd.credits import discounted, log_ratio
from opd.loss import Per, push
from opd.method import TEACHER, Clip, Group, Method, Share, one


def token_opd(
    *,
    against: Against = "behaviour",
    discount: Share = 0.0,
    group: Group = 1,
    clip: Clip = None,
    per: Per = "token",
) -> Method:
    """Raise each sampled token by how much likelier the teacher finds it: one teacher pass, no vocabulary.

    Speaks: student. Judge: teacher; says TOKEN.
    Loss: -mean over tokens of exp(log pi - log anchor) A_t, A_t = sum_k discount^k [log teacher - log
    student]_{t+k}. `against` says which of the student's log-probabilities the advantage subtracts (the anchor is
    the same, or the behaviour when it is `live`): behaviour is the paper's; with several updates on one batch,
    `live` keeps the expected gradient that of KL(student || teacher). `clip=[low, high]` adds PPO's; the paper has
    none. The group is only prompt reuse.
    Gradient: through log pi of the sampled token; in expectation, at discount 0 and on-policy, exactly the
    per-token reverse KL's.
    Source: Thinking Machines, "On-Policy Distillation" (2025) and tinker-cookbook `train_on_policy`.
    Differs from the paper in: the mean over tokens (`per: sequence_sum` is its sum), which only rescales the
    learning rate.
    """
    credit = discounted(log_ratio(TEACHER, against), discount)
    anchor = old() if against == "old" else None
    return Method(speaks=one("student"), loss=push(credit, anchor=anchor, clip=clip).per(per), group=group)
