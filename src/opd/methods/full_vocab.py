"""Several experts merged into one student by the exact reverse KL over the whole vocabulary."""

from __future__ import annotations

from opd.divergences import Divergence
from opd.loss import Per, match
from opd.method import EXPERT, Method, one
from opd.types import Judge


def full_vocab(*, per: Per = "token") -> Method:
    """On each prompt the student is pulled onto the expert of the prompt's domain, on its own samples.

    Speaks: student. Judge: `expert`, the teacher named after the prompt's domain; says DENSE, carried as last hidden
    states and the expert's own head, so that memory grows with its width and not with the vocabulary.
    Loss: mean over tokens of KL(student || expert of the prompt), in nats.
    Gradient: through the student's distribution, all of it: q (d - E_q d), d = log q - log p.
    Source: DeepSeek-V4 technical report (2026), eq. 29 and section 5.2.2: experts loaded one after another
    (`teachers.ROLE.resident: false`), hidden states cached (`run.carry`), rows ordered by expert, one head at a time.
    Differs from the paper in: its weights w_i are not disclosed; here an expert weighs as much as its prompts are
    drawn (`data.train.N.weight`). The direct gradient of the KL is our reading; the report does not print it.
    """
    return Method(speaks=one("student"), loss=match(Judge(EXPERT), Divergence("reverse_kl")).per(per))
