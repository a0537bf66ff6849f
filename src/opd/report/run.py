"""A run folder, read: what the report and its rules look at. No torch, and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from opd.errors import OpdError, UsageError
from opd.log import RunFolder, read, read_json

FILES = ("plan.json", "recipe.yaml", "metrics.jsonl", "summary.json", "events.jsonl")
_PLACE = {"step", "stage", "event"}
Points = list[tuple[float, float]]


class Estimate(NamedTuple):
    """A measured value and, where known, the interval it was given."""

    value: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Estimate) -> bool | None:
        """Whether the intervals meet; None where one has none."""
        if self.low is None or self.high is None or other.low is None or other.high is None:
            return None
        return self.low <= other.high and other.low <= self.high


@dataclass(frozen=True)
class Run:
    """Everything the report reads of one run. `problems` are sentences about files that could not be read."""

    path: Path
    name: str
    plan: Mapping[str, Any]
    recipe: Mapping[str, Any]
    origins: Mapping[str, str]
    lock: Mapping[str, Any]
    summary: Mapping[str, Any]
    steps: Mapping[int, Mapping[str, Any]]  # training lines of metrics.jsonl by step
    evals: Mapping[int, Mapping[str, Estimate]]  # evaluations by step: "accuracy", "math/accuracy", ...
    perf: Mapping[int, Mapping[str, Any]]
    events: tuple[Mapping[str, Any], ...]
    problems: tuple[str, ...] = ()

    def points(self, key: str) -> Points:
        """(step, value) of a metric or a performance figure, where it is a finite number."""
        source = self.perf if key in self.perf_keys else self.steps
        found = ((step, finite(line.get(key))) for step, line in source.items())
        return [(float(step), value) for step, value in found if value is not None]

    @cached_property
    def keys(self) -> tuple[str, ...]:
        """Names of the training metrics, in the order of first appearance."""
        return _keys(self.steps.values())

    @cached_property
    def perf_keys(self) -> tuple[str, ...]:
        return _keys(self.perf.values())

    @property
    def last_step(self) -> int:
        return max((*self.steps, *self.evals), default=0)

    @property
    def status(self) -> str:
        return str(self.summary.get("status") or "running")

    @property
    def method(self) -> str:
        return str(self.plan.get("method") or dig(self.recipe, "method.name") or "?")

    @property
    def stages(self) -> list[tuple[int, str]]:
        """(first step, name) of each stage as it was run."""
        found: list[tuple[int, str]] = []
        for step, line in self.steps.items():
            name = str(line.get("stage") or "")
            if name and (not found or found[-1][1] != name):
                found.append((step, name))
        return found

    def before(self) -> Mapping[str, Estimate]:
        """The evaluation before training: the summary's, or the first one recorded."""
        return estimates(self.summary.get("before") or {}) or next(iter(self.evals.values()), {})

    def after(self) -> Mapping[str, Estimate]:
        """The evaluation after training: the summary's, or the last of at least two recorded."""
        last = list(self.evals.values())[-1] if len(self.evals) > 1 else {}
        return estimates(self.summary.get("after") or {}) or last

    def headline(self) -> str | None:
        """The evaluation's main figure: what the recipe names, else accuracy, else what there is."""
        named = str(dig(self.recipe, "eval.metric") or "").removeprefix("eval/")
        known = dict.fromkeys((*self.after(), *self.before(), *(n for e in self.evals.values() for n in e)))
        if named == "dev_score":  # a mean of what was measured: its parts, which have intervals, say more
            named = ""
        return next((n for n in (named, "accuracy", "accuracy_sampled", "dev_score", *known) if n in known), None)


def load(path: Path) -> Run:
    """Read a run folder; a file that is missing is empty, one that is broken becomes a sentence in `problems`.

    Raises UsageError where there is no folder, or one that is not a run.
    """
    path = RunFolder.open(path).path
    if not any((path / name).exists() for name in FILES):
        raise UsageError(f"{path} is not a run: it has none of {', '.join(FILES)}")
    problems: list[str] = []
    metrics = _lines(path / "metrics.jsonl", problems)
    return Run(
        path=path,
        name=path.resolve().name,
        plan=_document(path / "plan.json", problems),
        recipe=_document(path / "recipe.yaml", problems),
        origins=_document(path / "origins.json", problems),
        lock=_document(path / "lock.json", problems),
        summary=_document(path / "summary.json", problems),
        steps=_by_step(_training(line) for line in metrics),
        evals={
            step: estimates(line) for step, line in _by_step(m for m in metrics if m.get("event") == "eval").items()
        },
        perf=_by_step(_lines(path / "perf.jsonl", problems)),
        events=tuple(_lines(path / "events.jsonl", problems)),
        problems=tuple(problems),
    )


def estimates(line: Mapping[str, Any]) -> dict[str, Estimate]:
    """An evaluation's figures: "eval/accuracy" with "eval/accuracy_low" and "_high" become one Estimate "accuracy"."""
    prefixed = any(str(key).startswith("eval/") for key in line)
    own = [str(key) for key in line if key not in _PLACE and (str(key).startswith("eval/") or not prefixed)]
    values = {key.removeprefix("eval/"): finite(line[key]) for key in own}
    names = [name for name in values if not _is_edge(name, values)]
    return {
        name: Estimate(value, values.get(f"{name}_low"), values.get(f"{name}_high"))
        for name in names
        if (value := values[name]) is not None
    }


def finite(value: Any) -> float | None:
    """The value as a float where it is a finite number (a boolean is not one)."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    return None


def dig(tree: Any, dotted: str) -> Any:
    """The value at a dotted key, or None."""
    for key in dotted.split("."):
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """A nested document by dotted key; lists by index, as the origins name them."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(tree, Mapping) and tree:
        items = tree.items()
    elif isinstance(tree, list) and any(isinstance(item, Mapping) for item in tree):
        items = enumerate(tree)
    else:
        return {prefix: tree} if prefix else {}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= flatten(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _training(line: Mapping[str, Any]) -> Mapping[str, Any]:
    """What a line says beside its evaluation: an evaluation also measures the critic on held-out prompts."""
    if line.get("event") != "eval":
        return line
    rest = {key: value for key, value in line.items() if key not in _PLACE and not str(key).startswith("eval/")}
    return rest and {**rest, "step": line.get("step")}


def _is_edge(name: str, values: Mapping[str, Any]) -> bool:
    base = name.removesuffix("_low").removesuffix("_high")
    return base != name and base in values


def _keys(lines: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    found = dict.fromkeys(key for line in lines for key, value in line.items() if finite(value) is not None)
    found.pop("step", None)
    return tuple(found)


def _by_step(lines: Iterable[Mapping[str, Any]]) -> dict[int, Mapping[str, Any]]:
    """Lines merged by step, in order; where a resumed run wrote a step twice, the later values stand."""
    merged: dict[int, dict[str, Any]] = {}
    for line in lines:
        step = line.get("step")
        if isinstance(step, int) and not isinstance(step, bool):
            merged.setdefault(step, {}).update(line)
    return dict(sorted(merged.items()))


def _lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    try:
        return read(path)
    except OpdError as error:
        problems.append(str(error))
        return []


def _document(path: Path, problems: list[str]) -> Mapping[str, Any]:
    try:
        if path.suffix == ".yaml":
            found = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else None
        else:
            found = read_json(path)
    except (OpdError, yaml.YAMLError) as error:
        problems.append(f"{path.name}: {str(error).splitlines()[0]}")
        return {}
    if found is not None and not isinstance(found, Mapping):
        problems.append(f"{path.name}: expected a mapping, found {type(found).__name__}")
    return found if isinstance(found, Mapping) else {}
