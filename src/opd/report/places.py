"""Charts over the place in the answer: a curve a quarter of the run, so that one sees where the two are apart, and how
that moves."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean

from opd.report.run import Run
from opd.report.svg import SHADES, Series


def octaves(run: Run, name: str) -> list[int]:
    """Where the stretches begin that were measured: 1, 2, 4, ..."""
    prefix = name.removesuffix("{}")
    return sorted(int(key.removeprefix(prefix)) for key in run.keys if key.startswith(prefix))


def by_place(runs: Sequence[Run], name: str, starts: Sequence[int]) -> list[Series]:
    """Of one run a curve for each quarter of its steps, the latest darkest; of several the last quarter of each."""
    alone = len(runs) == 1
    found = []
    for number, run in enumerate(runs):
        steps = [step for step, line in run.steps.items() if any(name.format(start) in line for start in starts)]
        parts = min(SHADES, len(steps)) if alone else 1
        cuts = [round(i * len(steps) / parts) for i in range(parts + 1)] if alone else [len(steps) * 3 // 4, len(steps)]
        for place, (a, b) in enumerate(pairwise(cuts)):
            points = _curve(run, name, starts, steps[a:b])
            label = _span(steps[a:b]) if alone else run.name
            if points:
                found.append(Series(label, points, colour=number, shade=place + SHADES - parts + 1, dots=True))
    return found


def _curve(run: Run, name: str, starts: Sequence[int], steps: Sequence[int]) -> list[tuple[float, float]]:
    curve = []
    for place, start in enumerate(starts):
        values = [float(x) for step in steps if (x := run.steps[step].get(name.format(start))) is not None]
        if values:
            curve.append((float(place), fmean(values)))
    return curve


def _span(steps: Sequence[int]) -> str:
    if not steps:
        return ""
    return f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
