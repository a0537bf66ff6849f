"""Best of n by a critic: imitate the sample that looks most like the teacher's. GAD's cheap rival."""

from __future__ import annotations

from typing import Annotated, Literal

from annotated_types import Ge

from opd.gates import best
from opd.loss import Objective, Per, learn, nll
from opd.method import CRITIC, Method, one


def best_of_n(
    *,
    group: Annotated[int, Ge(2)] = 8,
    objective: Literal["bradley_terry", "bce"] = "bradley_terry",
    per: Per = "sequence_sum",
) -> Method:
    """Cross entropy on the one of `group` samples that the critic of GAD scores highest: selection instead of credit.

    Speaks: student, `group` samples a prompt. Judges: critic, SCORE; teacher, TEXT.
    Loss: mean over groups of -log student(y) in nats, y the group's best; written as the mean over all rollouts of
    group size on the best and 0 on the others. Samples that tie share the group's weight, one that ended by itself goes
    before one that was cut, and a group without a winner weighs nothing. The critic minimises what GAD's does.
    Gradient: through log student of the best sample's tokens; the critic's through its own objective alone.
    Source: rejection sampling, as in RAFT, arXiv 2304.06767, with the reward of GAD, arXiv 2511.10643.
    Differs from the paper in: selection and update alternate every step. Whole answers are summed (`per:
    sequence_sum`), so that a critic who knows nothing teaches nothing; with `per: sequence` the mean over each answer's
    tokens would favour short ones by itself.
    """
    critic = learn(CRITIC, Objective(objective, good="teacher", bad="student"))
    return Method(speaks=one("student"), loss=nll().where(best(CRITIC)).per(per) + critic, group=group, goal="text")
