"""Supervised fine-tuning on recorded answers."""

from __future__ import annotations

from opd.loss import nll
from opd.method import Method, one


def sft() -> Method:
    """Cross entropy on the answers that the data records.

    Speaks: data. Judge: none. Loss: mean over tokens of -log student(y_t), in nats, at temperature 1.
    Gradient: through the student at each answer token; the stop token counts as one.
    Source: any text book. Differs from it in: nothing.
    """
    return Method(speaks=one("data"), loss=nll(), goal="text")
