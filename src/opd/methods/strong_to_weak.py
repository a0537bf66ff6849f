"""Strong to weak: a large model's answers first, then its logits on the small model's own."""

from __future__ import annotations

from typing import Literal

from opd.divergences import Divergence
from opd.loss import Per, match, nll
from opd.method import TEACHER, Method, Positive, one


def strong_to_weak(
    *,
    phase: Literal["off_policy", "on_policy"] = "on_policy",
    divergence: Literal["forward_kl", "reverse_kl"] = "reverse_kl",
    temperature: Positive = 1.0,
    per: Per = "token",
) -> Method:
    """Two stages of one recipe, each over both answer modes of the teacher (thinking and not).

    Speaks: teacher in the phase `off_policy`, student in `on_policy`. Judge: teacher, DENSE, in the second.
    Loss: off policy, mean over tokens of -log student(y_t) on the teacher's text; on policy, mean over tokens of
    `divergence` between teacher and student, in nats, both sides' logits over `temperature`.
    Gradient: through the student's distribution.
    Source: Qwen3 technical report, arXiv 2505.09388, section 4.5. The modes are two sources of the same prompts whose
    `wrap` adds the switch: `{path: p.jsonl, wrap: "{prompt} /think"}` and `/no_think`.
    Differs from the paper in: nothing that it states; it does not state the direction of the KL, the temperature, the
    mean or whether logits are cut, so `reverse_kl` over the whole vocabulary is our choice.
    """
    if phase == "off_policy":
        return Method(speaks=one("teacher"), loss=nll().per(per), goal="text")
    chosen = Divergence(divergence, temperature=temperature)
    return Method(speaks=one("student"), loss=match(TEACHER, chosen).per(per))
