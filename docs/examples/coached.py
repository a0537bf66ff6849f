"""A method of one's own: the teacher's log-ratio and the task's reward as one credit."""

from __future__ import annotations

from opd.anchors import old
from opd.credits import log_ratio, reward
from opd.loss import push
from opd.method import TEACHER, Clip, Group, Method, NotNegative, one


def coached(*, group: Group = 8, pull: NotNegative = 0.5, clip: Clip = (0.2, 0.2)) -> Method:
    """Raise what the verifier rewards and what the teacher finds likelier, in one push.

    Speaks: student, `group` samples a prompt. Judge: teacher; says TOKEN. Reads the task's reward.
    Loss: -mean over tokens of min(r A, clip(r) A), r = pi / pi_old, A = (reward - group mean) + pull * [log teacher -
    log pi_old]. At pull 0 the teacher is not asked at all.
    """
    credit = reward() + pull * log_ratio(TEACHER, "old")
    return Method(speaks=one("student"), loss=push(credit, anchor=old(), clip=clip), group=group, goal="reward")
