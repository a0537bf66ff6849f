"""Cross-stage distillation: earlier checkpoints of the same model teach back what later stages forgot."""

from __future__ import annotations

from typing import Annotated

from annotated_types import Ge

from opd.anchors import old
from opd.credits import log_ratio
from opd.gates import band
from opd.loss import push
from opd.method import EXPERT, Clip, Group, Method, one
from opd.types import Judge


def cross_stage(*, beta: Annotated[float, Ge(1)] = 2.0, clip: Clip = (0.2, 0.28), group: Group = 1) -> Method:
    """Raise each sampled token by how much likelier the stage's own checkpoint finds it, inside two trust regions.

    Speaks: student. Judge: `expert`, the teacher named after the prompt's domain: the checkpoint that its prompts
    trained; says TOKEN.
    Loss: -mean over rollouts of the mean over tokens of pop(rho) min(r A, clip(r) A), A = log expert - log student now,
    r = student / old, rho = old / sampler kept where it lies in [1/beta, beta] and else 0; the token still counts.
    Gradient: r A grad log student where neither region stops it; none through A, rho or the expert.
    Source: GLM-5 technical report, eq. 1 with the advantage of its last stage; group 1, for no group is compared, and
    1024 prompts a batch.
    Differs from the paper in: the expert is scored by the trainer's engine, not by the inference engine.
    """
    loss = push(log_ratio(Judge(EXPERT), "live"), anchor=old(), clip=clip).where(band(1 / beta, beta)).per("sequence")
    return Method(speaks=one("student"), loss=loss, group=group)
