"""Methods, rewards and recipes that the tests of recipes read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from annotated_types import Ge, Interval

from opd.errors import UsageError
from opd.recipe import Resolved, load
from opd.schedule import Coefficient

Share = Annotated[float, Interval(ge=0, le=1)]


def pull(*, beta: Share = 0.5, kind: Literal["near", "far"] = "near", kl: Coefficient = 0.001) -> object:
    """Pull the student."""
    if kind == "far" and beta == 1:
        raise ValueError("far with beta = 1 is zero everywhere")
    return object()


def shove(*, group: Annotated[int, Ge(2)] = 8, clip: tuple[float, float] | None = (0.2, 0.2)) -> object:
    """Push the student."""
    return object()


def short(*, limit: int, copy: bool = False) -> object:
    """Reward short answers."""
    return object()


METHODS: dict[str, Callable[..., Any]] = {"pull": pull, "shove": shove}
REWARDS: dict[str, Callable[..., Any]] = {"short": short}

RECIPE = """\
student: {model: some/model}
teachers: {teacher: {model: some/teacher}}
data:
  train: a.jsonl
method: {name: pull, beta: 0.25}
train:
  lr: 1e-5
  epochs: 2
"""
STAGES = """\
student: {model: some/model, lora: 16}
teachers: {teacher: {answers: a.jsonl}, math: {model: m/m, licence: MIT}}
critic: {lr: 2e-6, accuracy_band: [0.6, 0.95]}
data:
  train: [{path: a.jsonl, domain: chat, weight: 2}, b.jsonl]
  dev: a.jsonl
  think: strip
reward: [{use: short, limit: 5}, {use: short, limit: 7, weight: -0.5}]
stages:
  - {name: warm-up, method: pull, critic: {learn: true, alone_steps: 10}, steps: 30}
  - {method: {name: shove, group: 4}, train: {lr: 2e-6, clip: null}, speak: {temperature: 0.8}}
speak: {temperature: 0.9, max_tokens: 64}
train: {prompts: 16, epochs: 0.5, betas: [0.9, 0.95]}
eval: {every: 5, length_band: [0.8, 1.2]}
run: {seed: 3, name: try}
"""


def read(folder: Path, text: str, *overrides: str, name: str = "r.yaml", **kw: Any) -> Resolved:
    (folder / name).write_text(text)
    return load(folder / name, overrides, **{"methods": METHODS, "rewards": REWARDS} | kw)


def refused(folder: Path, text: str, *overrides: str, **kw: Any) -> list[str]:
    """The problems, without the folder."""
    with pytest.raises(UsageError) as caught:
        read(folder, text, *overrides, **kw)
    return [problem.replace(f"{folder}/", "") for problem in caught.value.problems]
