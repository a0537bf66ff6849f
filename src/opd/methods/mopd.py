"""Several experts merged into one student: the expert of each prompt's domain judges the student's own samples."""

from __future__ import annotations

from opd.anchors import live
from opd.credits import log_ratio, reward
from opd.gates import band
from opd.loss import Per, push
from opd.method import EXPERT, Group, Method, NotNegative, Positive, one
from opd.types import Judge


def mopd(
    *,
    alpha: NotNegative = 0.0,
    low: NotNegative = 0.5,
    high: Positive = 2.0,
    std: bool = True,
    min_std: NotNegative = 0.0,
    group: Group = 4,
    per: Per = "sequence",
) -> Method:
    """Raise each sampled token by how much likelier the domain's expert finds it, and by `alpha` times its outcome.

    Speaks: student. Judge: `expert`, the teacher named after the prompt's domain; says TOKEN. Reads the task's reward
    when alpha > 0.
    Loss: -mean over rollouts of the mean over tokens of w_t A_t log student(y_t), w_t = student / sampler where that
    ratio of the trainer now to the engine that spoke lies in [low, high], else 0 (masked tokens count in the mean), A_t
    = log expert - log student + alpha (reward - group mean) / group std. The outcome is inside the advantage, under the
    same weight.
    Gradient: through log student of the sampled token; w_t and A_t carry none.
    Source: MiMo-V2-Flash, arXiv 2601.02780, eq. 7-9; Nemotron-Cascade 2, arXiv 2603.19220, section 4.4, whose band
    [0.5, 2], group of 4 and absence of an outcome are the defaults.
    Differs from the paper in: MiMo combines with an outcome reward by default, and its alpha and band are not
    disclosed; 0 here.
    """
    if alpha > 0 and group < 2:
        raise ValueError("alpha compares the samples of a prompt, and a group of 1 has nothing to compare: raise group")
    credit = log_ratio(Judge(EXPERT), "live") + alpha * reward(std=std, min_std=min_std)
    loss = push(credit, anchor=live()).where(band(low, high, "live")).per(per)
    return Method(speaks=one("student"), loss=loss, group=group)
