"""The live panel of a run: one screen that a person understands; plain lines where there is no terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from opd.state import Watch

SHOWN = {  # what a person looks at, in order, with a short name
    "loss/total": "loss",
    "reward/mean": "reward",
    "score/mean": "critic's score of the student",
    "critic/accuracy": "critic tells them apart in",
    "kl/reverse_nats": "KL(student || teacher), nats",
    "overlap/ratio": "likely tokens they share",
    "entropy/student_nats": "student entropy, nats",
    "length/student_tokens": "answer length, tokens",
    "length/ratio": "length, student / teacher",
    "group/degenerate_share": "groups that teach nothing",
    "grad/norm": "gradient norm",
    "rate/tokens_per_s": "tokens a second",
}
BARS = "▁▂▃▄▅▆▇█"


@contextmanager
def panel(quiet: bool = False, console: Console | None = None) -> Iterator[Watch]:
    """A `watch` for `train`: a live panel on a terminal, a line now and then elsewhere, nothing when quiet."""
    console = console or Console()
    if quiet:
        yield _unseen
        return
    view = View()
    if not console.is_terminal:
        yield partial(_line, console, view)
        return
    with Live(view.render(), console=console, refresh_per_second=4) as live:

        def watch(kind: str, numbers: Mapping[str, Any]) -> None:
            view.see(kind, numbers)
            live.update(view.render())

        yield watch


def _unseen(_kind: str, _numbers: Mapping[str, Any]) -> None: ...


def _line(console: Console, view: View, kind: str, numbers: Mapping[str, Any]) -> None:
    view.see(kind, numbers)
    if kind == "stage":
        text = f"stage {numbers['name']}, {numbers['steps']} steps: {numbers['equation']}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    elif kind == "eval":
        accuracy = [f"{k.removeprefix('eval/')} {v:.3f}" for k, v in numbers.items() if k in _EVAL]
        console.print(f"step {numbers['step']}: {', '.join(accuracy)}", highlight=False, soft_wrap=True)
    elif kind == "warning":
        console.print(
            f"warning: {numbers['message']}: {numbers['remedy']}", highlight=False, markup=False, soft_wrap=True
        )
    elif kind == "step" and view.step_in_stage % max(1, view.steps // 10) == 0:
        said = [f"{short} {_number(numbers[name])}" for name, short in SHOWN.items() if name in numbers][:5]
        console.print(f"step {numbers['step']}: {', '.join(said)}", highlight=False, soft_wrap=True)


_EVAL = ("eval/accuracy", "eval/accuracy_sampled", "eval/ngram_f1", "eval/length_ratio", "critic/heldout_accuracy")


class View:
    """What has been seen so far, and how it looks."""

    def __init__(self) -> None:
        self.stage, self.steps, self.step_in_stage = "", 0, 0
        self.equation = ""
        self.curves: dict[str, list[float]] = {}
        self.evals: list[Mapping[str, Any]] = []
        self.warnings: list[str] = []

    def see(self, kind: str, numbers: Mapping[str, Any]) -> None:
        """Take in one event."""
        if kind == "stage":
            self.stage, self.steps, self.equation = numbers["name"], numbers["steps"], numbers["equation"]
            self.step_in_stage, self.curves = 0, {}
        elif kind == "eval":
            self.evals.append(numbers)
        elif kind == "warning":
            self.warnings = [*self.warnings[-2:], f"{numbers['message']}: {numbers['remedy']}"]
        elif kind == "step":
            self.step_in_stage += 1
            for name in SHOWN:
                if name in numbers:
                    self.curves.setdefault(name, []).append(float(numbers[name]))

    def render(self) -> RenderableType:
        """The panel."""
        table = Table.grid(padding=(0, 2))
        for name, short in SHOWN.items():
            if values := self.curves.get(name):
                table.add_row(Text(short, style="dim"), _number(values[-1]), Text(spark(values), style="cyan"))
        parts: list[RenderableType] = [Text(self.equation, style="italic dim"), table]
        if self.evals:
            first, last = self.evals[0], self.evals[-1]
            for name in _EVAL:
                if name in last:
                    before = f"{first[name]:.3f} → " if name in first else ""
                    change = f"{before}{last[name]:.3f} at step {last['step']}"
                    parts.append(Text.assemble((name.split("/")[1] + "  ", "bold"), change))
        parts += [Text(f"! {w}", style="yellow") for w in self.warnings]
        title = f"{self.stage}  step {self.step_in_stage} of {self.steps}"
        bar = Padding(ProgressBar(max(1, self.steps), self.step_in_stage), 0)  # a bare bar does not end its line
        return Panel(Group(bar, *parts), title=Text(title))


def spark(values: list[float], width: int = 40) -> str:
    """The course of a number in one line; each mark is the mean of its stretch."""
    if len(values) > width:
        cut = [values[i * len(values) // width : (i + 1) * len(values) // width] for i in range(width)]
        values = [sum(c) / len(c) for c in cut]
    low, high = min(values), max(values)
    return "".join(BARS[int((v - low) / (high - low) * 7.999) if high > low else 3] for v in values)


def _number(x: float) -> str:
    return f"{x:.3g}" if abs(x) < 1000 else f"{x:,.0f}"
