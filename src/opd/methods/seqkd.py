"""Sequence-level knowledge distillation: fine-tuning on what the teacher said."""

from __future__ import annotations

from opd.loss import nll
from opd.method import Method, one


def seqkd() -> Method:
    """Cross entropy on the teacher's own text: off-policy, and all that a closed teacher allowed before GAD.

    Speaks: teacher (recorded answers, or a local model that samples them). Judge: none.
    Loss: mean over tokens of -log student(y_t), in nats, at temperature 1; y from the teacher. In expectation this
    is the sequence-level forward KL, up to the teacher's entropy.
    Source: Kim and Rush, arXiv 1606.07947, section 3.2. Differs from it in: teacher text is sampled unless the recipe
    says `teachers.teacher.beams` (theirs: 5), or recorded.
    """
    return Method(speaks=one("teacher"), loss=nll(), goal="text")
