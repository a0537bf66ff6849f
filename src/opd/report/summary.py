"""What a run came to, in words and small tables: outcome, figures, objective, warnings, comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from markupsafe import Markup

from opd.report.curves import figure_words, is_share
from opd.report.lights import Light
from opd.report.run import Estimate, Run, dig, finite
from opd.report.svg import Change, bar, change_chart, number, swatch

EVALUATIONS_SHOWN = 60


@dataclass(frozen=True, slots=True)
class Tile:
    """One figure at the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True, slots=True)
class StageWords:
    """What one stage optimised; `earlier` is the equation of the stage before."""

    name: str
    facts: str
    words: str
    equation: str
    earlier: str = ""


@dataclass(frozen=True, slots=True)
class Warning:
    """A warning, once, with when it was said."""

    when: str
    message: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of the comparison: text, and a bar where runs are compared by size."""

    text: str
    bar: Markup | str = ""


def status_words(run: Run) -> str:
    """The status, and for a run without a summary what that means."""
    if not run.summary:
        return f"no summary: still running, or killed at step {run.last_step}"
    words = f"{run.status} at step {_step(run)}"
    return f"{words}: {run.summary['reason']}" if run.summary.get("reason") else words


def badge(run: Run) -> str:
    """The status as one of the words that have a colour."""
    return run.status if run.status in ("finished", "stopped", "failed", "running") else "unknown"


def outcome(run: Run) -> str:
    """One sentence: how the main figure moved, and whether that is more than chance."""
    name = run.headline()
    before, after = run.before().get(name or ""), run.after().get(name or "")
    if name is None or (before is None and after is None):
        return "No evaluation was recorded, so nothing can be said of the result."
    label = name.replace("_", " ").replace("/", " ")
    if before is None or after is None:
        one = after or before
        assert one is not None
        when = "after" if after else "before"
        return f"The {label} was {estimate(one, name)} {when} training; the other end was not measured."
    change = after.value - before.value
    verb = "rose" if change > 0 else "fell" if change < 0 else "stayed"
    sentence = f"The {label} {verb} from {estimate(before, name)} to {estimate(after, name)}"
    if not change:
        return sentence + "."
    overlaps = before.overlaps(after)
    doubt = {True: "; the intervals overlap, so this may be chance", False: ", beyond the intervals", None: ""}[
        overlaps
    ]
    return f"{sentence}: {_change(before, after, name)}{doubt}."


def estimate(value: Estimate | None, name: str) -> str:
    """A figure with its interval: 63.5 % [59.1, 67.6]; shares of one decimal."""
    if value is None:
        return "–"
    share = is_share(name)
    text = f"{value.value * 100:.1f} %" if share else number(value.value)
    if value.low is None or value.high is None:
        return text
    low, high = (f"{v * 100:.1f}" if share else number(v) for v in (value.low, value.high))
    return f"{text} [{low}, {high}]"


def model_words(value: Any) -> str:
    """A model as a person would name it: `{model: m, lora: 16}` is "m (lora 16)"."""
    if isinstance(value, Mapping):
        main = next((str(value[k]) for k in ("model", "answers", "url", "cache") if value.get(k)), "?")
        extra = [f"{k} {value[k]}" for k in ("lora", "quantize") if value.get(k)]
        return f"{main} ({', '.join(extra)})" if extra else main
    return str(value) if value else "?"


def teacher_words(run: Run) -> list[tuple[str, str]]:
    """(role, model) of each teacher."""
    teachers = run.plan.get("teachers") or run.recipe.get("teachers") or {}
    if not isinstance(teachers, Mapping):
        return [("teacher", model_words(teachers))]
    return [(str(role), model_words(value)) for role, value in teachers.items()]


def tiles(run: Run) -> list[Tile]:
    """The figures at the top."""
    found = []
    name = run.headline()
    if name:
        before, after = run.before().get(name), run.after().get(name)
        label = name.replace("_", " ")
        found.append(Tile(f"{label} before", _value(before, name), _range(before, name)))
        found.append(Tile(f"{label} after", _value(after, name), _range(after, name)))
    best = run.summary.get("best")
    if isinstance(best, Mapping) and isinstance(best.get("step"), int):
        value = finite(best.get("value"))
        found.append(
            Tile("best checkpoint", f"step {best['step']}", f"value {number(value)}" if value is not None else "")
        )
    generated, trained = (finite(dig(run.summary, f"tokens.{k}")) for k in ("generated", "trained"))
    if generated is not None:
        found.append(Tile("tokens generated", number(generated)))
    if trained is not None:
        found.append(Tile("tokens trained on", number(trained)))
    seconds = finite(run.summary.get("seconds"))
    if seconds is not None:
        found.append(Tile("time", duration(seconds), _time_shares(run)))
    flops = finite(run.summary.get("flops"))
    if flops:
        found.append(Tile("computation", flop_words(flops)))
    return found


def objective(run: Run) -> dict[str, Any]:
    """The plan's account of what was optimised; stages are told apart where there are several."""
    stages: list[StageWords] = []
    for stage in run.plan.get("stages") or ():
        if isinstance(stage, Mapping):
            name, method, steps = (_text(stage.get(key)) for key in ("name", "method", "steps"))
            facts = [method if method != name else "", f"{steps} steps" if steps else ""]
            earlier = stages[-1].equation if stages else ""
            words, equation = _text(stage.get("words")), _text(stage.get("equation"))
            stages.append(StageWords(name, ", ".join(filter(None, facts)), words, equation, earlier))
    needs = run.plan.get("needs")
    return {
        "words": _text(run.plan.get("objective_words")),
        "equation": _text(run.plan.get("equation")),
        "speaks": _text(run.plan.get("speaks")),
        "stages": stages,
        "several": len(stages) > 1,
        "reads": [str(sentence) for sentence in run.plan.get("reads") or ()],
        "needs": [(str(k), str(v)) for k, v in needs.items()] if isinstance(needs, Mapping) else [],
    }


def warnings(run: Run) -> list[Warning]:
    """Each warning once, with the steps it was given at."""
    found: dict[tuple[str, str], list[int]] = {}
    for event in run.events:
        if event.get("kind") == "warning":
            key = str(event.get("message") or ""), str(event.get("remedy") or "")
            step = event.get("step")
            found.setdefault(key, []).append(step if isinstance(step, int) else 0)
    return [Warning(_when(steps), message, remedy) for (message, remedy), steps in found.items()]


def timeline(run: Run) -> list[tuple[int, str, str]]:
    """(step, kind, message) of everything that happened but warnings and routine checkpoints."""
    return [
        (event["step"], str(event.get("kind")), str(event.get("message") or ""))
        for event in run.events
        if event.get("kind") not in ("warning", "checkpoint") and isinstance(event.get("step"), int)
    ]


def evaluation_table(run: Run) -> dict[str, Any] | None:
    """Evaluations by step; the best value of the main figure is marked."""
    if not run.evals:
        return None
    names = list(dict.fromkeys(name for line in run.evals.values() for name in line))
    head = run.headline() or ""
    names.sort(key=lambda name: (name != head, "/" in name))
    steps = list(run.evals)
    if len(steps) > EVALUATIONS_SHOWN:
        steps = [steps[round(i * (len(steps) - 1) / (EVALUATIONS_SHOWN - 1))] for i in range(EVALUATIONS_SHOWN)]
    best = max((line[head].value for line in run.evals.values() if head in line), default=None)
    rows = [
        {
            "step": step,
            "cells": [estimate(run.evals[step].get(name), name) for name in names],
            "best": head in run.evals[step] and run.evals[step][head].value == best,
        }
        for step in steps
    ]
    return {"names": [figure_words(name) for name in names], "rows": rows, "left_out": len(run.evals) - len(steps)}


def health_table(found: Sequence[Sequence[Light]]) -> list[dict[str, Any]]:
    """Rules by row, runs by column; a run without the data has None."""
    names = list(dict.fromkeys(light.name for run in found for light in run))
    rows = []
    for name in names:
        lights = [next((light for light in run if light.name == name), None) for run in found]
        rows.append({"name": name, "rule": next(light.rule for light in lights if light), "lights": lights})
    return rows


def comparison(runs: Sequence[Run]) -> dict[str, Any]:
    """One row a run: the main figure before and after, and what it cost; with bars."""
    name = next((found for run in runs if (found := run.headline())), "")
    costs = {
        "tokens generated": [finite(dig(run.summary, "tokens.generated")) for run in runs],
        "tokens trained on": [finite(dig(run.summary, "tokens.trained")) for run in runs],
        "time": [finite(run.summary.get("seconds")) for run in runs],
        "computation": [finite(run.summary.get("flops")) for run in runs],
    }
    costs = {label: values for label, values in costs.items() if any(v is not None for v in values)}
    rows = []
    for index, run in enumerate(runs):
        before, after = run.before().get(name), run.after().get(name)
        cells = [Cell(estimate(before, name)), Cell(estimate(after, name)), Cell(_change(before, after, name))]
        for label, values in costs.items():
            largest = max(v for v in values if v is not None)
            value = values[index]
            cells.append(Cell(_cost(label, value), bar(value, largest, index) if value is not None else ""))
        rows.append(
            {"name": run.name, "swatch": swatch(index), "method": run.method, "badge": badge(run), "cells": cells}
        )
    label = name.replace("_", " ")
    changes = [Change(run.name, run.before().get(name), run.after().get(name), i) for i, run in enumerate(runs)]
    changes = [change for change in changes if change.before or change.after]
    return {
        "columns": [f"{label} before", f"{label} after", "change", *costs]
        if name
        else ["before", "after", "change", *costs],
        "rows": rows,
        "chart": change_chart(changes, is_share(name), f"{label} before and after"),
        "label": label,
        "words": _ranking(runs, name),
    }


def duration(seconds: float) -> str:
    """48 s, 12 min 5 s, 3 h 20 min."""
    if seconds < 100:
        return f"{seconds:.3g} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def flop_words(flops: float) -> str:
    """4.15 PFLOP."""
    text = number(flops)
    return f"{text[:-1]} {text[-1]}FLOP" if text[-1].isalpha() else f"{text} FLOP"


def _ranking(runs: Sequence[Run], name: str) -> str:
    after = sorted(
        ((run.after()[name], run.name) for run in runs if name in run.after()), key=lambda p: p[0].value, reverse=True
    )
    if len(after) < 2:
        return ""
    (first, best), (second, next_best) = after[:2]
    overlaps = first.overlaps(second)
    doubt = f" Its interval overlaps that of {next_best}, so the order of these two may be chance." if overlaps else ""
    return f"Highest {name.replace('_', ' ')} after training: {best}, {estimate(first, name)}.{doubt}"


def _change(before: Estimate | None, after: Estimate | None, name: str) -> str:
    if before is None or after is None:
        return "–"
    change = after.value - before.value
    sign = "+" if change >= 0 else "−"
    return f"{sign}{abs(change) * 100:.1f} points" if is_share(name) else f"{sign}{number(abs(change))}"


def _cost(label: str, value: float | None) -> str:
    if value is None:
        return "–"
    if label == "time":
        return duration(value)
    return flop_words(value) if label == "computation" else number(value)


def _time_shares(run: Run) -> str:
    """Where the time went, from perf.jsonl."""
    step = [value for _, value in run.points("time/step_s")]
    if not step:
        return ""
    parts = []
    for label in ("speak", "judge", "learn"):
        spent = [value for _, value in run.points(f"time/{label}_s")]
        if spent and sum(step) > 0:
            parts.append(f"{label} {fmean(spent) * len(spent) / sum(step):.0%}".replace("%", " %"))
    return ", ".join(parts)


def _step(run: Run) -> int:
    step = run.summary.get("step")
    return step if isinstance(step, int) else run.last_step


def _value(value: Estimate | None, name: str) -> str:
    return number(value.value, is_share(name)) if value else "–"


def _range(value: Estimate | None, name: str) -> str:
    if value is None or value.low is None or value.high is None:
        return ""
    return f"{number(value.low, is_share(name))} to {number(value.high, is_share(name))}"


def _when(steps: list[int]) -> str:
    if len(steps) == 1:
        return f"step {steps[0]}"
    return f"{len(steps)} times, steps {min(steps)} to {max(steps)}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
