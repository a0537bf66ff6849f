"""What the student said, in the terminal: rows of samples.jsonl picked by step, worth or prompt. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from opd.errors import UsageError
from opd.log import RunFolder, read

Row = dict[str, Any]
_HEAT = ((2.0, "white on red"), (1.0, "black on dark_orange"), (0.5, "black on orange1"), (0.2, "black on wheat1"))
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def select(
    run: Path, step: int | None = None, worst: bool = False, best: bool = False, prompt: str | None = None, n: int = 8
) -> list[Row]:
    """At most `n` rows of a run's samples.

    `step` is one with samples, by default the last. `prompt` is the start of a prompt's id or a part of its text;
    without a step it is followed through all of them. `worst` and `best` order by reward, or where there is none by
    how far the critic puts the student above the teacher; rows without either come last.
    Raises UsageError when nothing fits, saying what there is.
    """
    if worst and best:
        raise UsageError("--worst and --best are opposite orders; give one of them")
    if n < 1:
        raise UsageError(f"--n {n}: at least one sample must be shown")
    path = RunFolder.open(run).path / "samples.jsonl"
    rows = [row for row in read(path) if isinstance(row.get("step"), int) and isinstance(row.get("text"), str)]
    if not rows:
        raise UsageError(f"{run} has no samples yet: {path.name} is empty, or run.sample_rows is 0 in its recipe")
    steps = sorted({row["step"] for row in rows})
    if step is not None and step not in steps:
        raise UsageError(f"no samples at step {step}; there are at {_listed(steps)}")
    if prompt is not None:
        rows = [row for row in rows if _matches(row, prompt)]
        if not rows:
            raise UsageError(f"no sampled prompt has an id that starts with {prompt!r}, or a text that contains it")
    wanted = steps[-1] if step is None and prompt is None else step
    if wanted is not None:
        rows = [row for row in rows if row["step"] == wanted]
        if not rows:
            raise UsageError(
                f"the prompt {prompt!r} has no sample at step {wanted}; leave --step out to see all its steps"
            )
    if worst or best:
        rows = sorted(rows, key=lambda row: _worth(row, last=math.inf if worst else -math.inf), reverse=best)
    return list(islice(rows, n))


def show(
    run: Path, step: int | None = None, worst: bool = False, best: bool = False, prompt: str | None = None, n: int = 8
) -> RenderableType:
    """The picked rows for a rich console: student beside teacher, with rewards and the critic's scores."""
    rows = select(run, step, worst, best, prompt, n)
    return Group(*(_card(row) for row in rows))


def _card(row: Row) -> RenderableType:
    place = [f"step {row['step']}", row.get("stage"), row.get("domain"), row.get("prompt_id")]
    title = Text(" · ".join(_safe(part) for part in place if part), style="bold")
    student = _panel(_safe(row.get("speaker") or "student"), _facts(row), _said(row), "blue")
    if not isinstance(row.get("teacher_text"), str):
        both: RenderableType = student
    else:
        score = _number(row.get("teacher_score"))
        facts = Text("" if score is None else f"score {score:.3g}", style="dim")
        teacher = _panel("teacher", facts, Text(_safe(row["teacher_text"]), overflow="fold"), "dark_orange")
        both = Table.grid(expand=True, padding=(0, 1))
        both.add_column(ratio=1, overflow="fold")
        both.add_column(ratio=1, overflow="fold")
        both.add_row(student, teacher)
    prompt = Text(_safe(row.get("prompt") or ""), style="italic")
    return Group(title, prompt, both, Text(_margin(row), style="dim"), Text())


def _panel(title: str, facts: Text, said: Text, colour: str) -> Panel:
    body = Group(facts, said) if facts.plain else said
    return Panel(body, title=Text(title, style="bold"), title_align="left", border_style=colour)


def _facts(row: Row) -> Text:
    facts = [f"{row['tokens']} tokens"] if isinstance(row.get("tokens"), int) else []
    facts += [f"{name} {value:.3g}" for name in ("reward", "score") if (value := _number(row.get(name))) is not None]
    line = Text("  ".join(facts), style="dim")
    if row.get("finish") == "length":
        line.append("  cut at the limit", style="red")
    return line


def _said(row: Row) -> Text:
    """The text; warmer where it is likelier to the student than to the teacher."""
    kl, pieces = row.get("kl_per_token"), row.get("pieces")
    if not isinstance(kl, list) or not isinstance(pieces, list) or len(kl) != len(pieces):
        return Text(_safe(row["text"]), overflow="fold") if row["text"] else Text("(empty)", style="dim")
    text = Text(overflow="fold")
    for value, piece in zip(kl, pieces, strict=True):
        nats = _number(value) or 0.0
        text.append(_safe(piece), style=next((style for edge, style in _HEAT if nats >= edge), ""))
    return text


def _margin(row: Row) -> str:
    student, teacher = _number(row.get("score")), _number(row.get("teacher_score"))
    if student is None or teacher is None:
        return ""
    share = 1 / (1 + math.exp(max(-50.0, min(50.0, student - teacher))))
    side = "teacher" if share >= 0.5 else "student"
    return f"critic prefers the {side}, {max(share, 1 - share):.0%} (margin {teacher - student:.3g})".replace("%", " %")


def _worth(row: Row, last: float) -> float:
    reward, score = _number(row.get("reward")), _number(row.get("score"))
    if reward is not None:
        return reward
    return last if score is None else score - (_number(row.get("teacher_score")) or 0.0)


def _matches(row: Row, prompt: str) -> bool:
    return str(row.get("prompt_id") or "").startswith(prompt) or prompt.lower() in str(row.get("prompt") or "").lower()


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _safe(value: Any) -> str:
    """Text that cannot move the cursor, change colours or reverse the line: control characters are made visible."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", str(value).replace("\r\n", "\n")).expandtabs(4)


def _listed(steps: Iterable[int]) -> str:
    known = [str(step) for step in steps]
    return ", ".join(known) if len(known) <= 12 else f"{', '.join(known[:5])}, …, {', '.join(known[-5:])}"
