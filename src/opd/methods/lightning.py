"""Lightning OPD: on-policy distillation whose texts and teacher's log-probabilities are made once, before training."""

from __future__ import annotations

from opd.anchors import live
from opd.credits import bounded, log_ratio
from opd.loss import Per, push
from opd.method import TEACHER, Method, Positive, one


def lightning(*, tau: Positive | None = None, per: Per = "token") -> Method:
    """Raise each token of the starting student's samples by how much likelier the teacher finds it than the student.

    Speaks: reference, the student at stage start, once to each prompt; the same texts come back in every epoch.
    Judge: teacher; says TOKEN, of texts that never change, so once is enough: `opd signals` writes it down, and
    `teachers.teacher.cache` trains from that without the teacher.
    Loss: -mean over tokens of log pi * A_t, A_t = log teacher - log pi as it is now, without gradient, held to
    [-tau, tau] (`tau: null`: not held). No importance weight.
    Gradient: without tau exactly that of 1/2 mean (log teacher - log pi)^2 over the reference's samples, their `k2`. At
    the first step that is the reverse KL's in expectation; later the samples lag behind, but the teacher stays a fixed
    point. (The derivative of the objective as the paper prints it does not contain the teacher.)
    Source: Lightning OPD, arXiv 2604.13010: the SFT policy rolled out once, the teacher asked once. The teacher must be
    the one whose text the student was fine-tuned on, or the two stages pull apart.
    Differs from the paper in: its bound tau and its mean are not known to us; by default there is no bound, and the
    mean is over tokens. Texts are sampled at temperature 1.
    """
    credit = log_ratio(TEACHER, "live")
    held = credit if tau is None else bounded(credit, -tau, tau)
    return Method(speaks=one("reference"), loss=push(held, anchor=live()).per(per))
