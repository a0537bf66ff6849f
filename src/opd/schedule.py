"""Numbers that change with the step: `linear(1, 0.1, 200)` in a recipe or in Python."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator


@dataclass(frozen=True, slots=True)
class Schedule:
    """From `start` to `end` over `steps` steps of a stage, then `end`. Steps count from 0."""

    kind: Literal["linear", "cosine"]
    start: float
    end: float
    steps: int

    def at(self, step: int) -> float:
        """The value at this step of the stage."""
        share = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        if self.kind == "cosine":
            share = (1 - math.cos(math.pi * share)) / 2
        return self.start + (self.end - self.start) * share

    def __str__(self) -> str:
        return f"{self.kind}({self.start:g}, {self.end:g}, {self.steps})"


def linear(start: float, end: float, steps: int) -> Schedule:
    """A straight line."""
    return Schedule("linear", start, end, steps)


def cosine(start: float, end: float, steps: int) -> Schedule:
    """Half a cosine wave."""
    return Schedule("cosine", start, end, steps)


def value(coefficient: float | Schedule, step: int) -> float:
    """A coefficient at a step, scheduled or not."""
    return coefficient.at(step) if isinstance(coefficient, Schedule) else float(coefficient)


_CALL = re.compile(r"^(linear|cosine)\(\s*([^,]+),\s*([^,]+),\s*(\d+)\s*\)$")


def parse(raw: Any) -> Any:
    """`linear(a, b, steps)` as a Schedule; anything else as it came."""
    if not isinstance(raw, str):
        return raw
    match = _CALL.match(raw.strip())
    if match is None:
        raise ValueError("a number, `linear(start, end, steps)` or `cosine(start, end, steps)`")
    return Schedule(match[1], float(match[2]), float(match[3]), int(match[4]))  # type: ignore[arg-type]


Coefficient = Annotated[float | Schedule, BeforeValidator(parse)]
