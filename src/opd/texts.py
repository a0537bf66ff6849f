"""Numbers about what the student said, of the texts alone: repetition, refusals, words that only a judge was shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean

from opd.metrics import ngrams, refuses, repetition, words
from opd.types import Rollout
from opd.views import SAME, View

REPEATS, TAIL = 10.0, 10_000  # Stable-OPD (arXiv 2604.08527): a ratio above 10; of the last 10 000 characters here
RUN = 3  # words in a row that two texts share by more than chance


def described(rollouts: Sequence[Rollout], views: Iterable[View]) -> dict[str, float]:
    """Means over the student's answers; nothing where it gave none."""
    said = [r for r in rollouts if r.speaker == "student"]
    if not said:
        return {}
    ratios = [repetition(r.text[-TAIL:]) for r in said]
    out = {
        "text/repetition": fmean(ratios),
        "text/repeating_share": fmean(ratio > REPEATS for ratio in ratios),
        "text/refusal_share": fmean(refuses(r.text) for r in said),
    }
    copied = [
        share for view in views if view.name != SAME for r in said if (share := copied_share(r, view)) is not None
    ]
    return out | ({"leak/copied_share": fmean(copied)} if copied else {})


def copied_share(rollout: Rollout, view: View) -> float | None:
    """Of the answer's runs of three words, the share that stand in what the judge was shown and not in the prompt.

    None where the view adds no such run, or the answer has none.
    """
    shown = view.of(rollout.prompt, rollout.hint)
    mine = _runs(rollout.text)
    if shown is None or not mine:
        return None
    told = _runs(shown.text).keys() - _runs(rollout.prompt.text).keys()
    return sum(count for run, count in mine.items() if run in told) / sum(mine.values()) if told else None


def _runs(text: str) -> Mapping[tuple[object, ...], int]:
    return ngrams(words(text), RUN)
