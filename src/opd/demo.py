"""`opd demo`: one student, one start, the same prompts, taught three ways, and a report that compares them.

    seqkd       the teacher's text, off-policy
    gad         the same text, black-box, on the student's own samples
    token_opd   the teacher's probabilities, on the student's own samples

Nothing is tuned to the run: the seed is fixed before, and what comes out is printed, whichever way it falls.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from opd import recipe as recipes
from opd.log import RunFolder
from opd.panel import panel

DOMAINS = ("group", "sort", "record")
MODEL = {"model": "world:student", "dtype": "float32"}
TRAIN = {"schedule": "linear", "final_lr_share": 0.05, "warmup_steps": 5, "weight_decay": 0.01}


@dataclass(frozen=True)
class Way:
    """One way to teach: its name, what it may know of the teacher, and what differs in its recipe."""

    name: str
    knows: str
    recipe: Mapping[str, Any]
    quick: Mapping[str, Any]


WAYS = (
    Way(
        "seqkd",
        "text",
        {"method": {"name": "seqkd"}, "train": {**TRAIN, "lr": 2e-4, "prompts": 64, "steps": 400}},
        {"steps": 60},
    ),
    Way(
        "gad",
        "text",
        {
            "critic": {"lr": 1e-3, "weight_decay": 0.01},
            "stages": [
                {
                    "name": "warm-up",
                    "method": {"name": "gad", "kl": 0.0, "std": False},
                    "critic": {"learn": True, "alone_steps": 30},
                    "steps": 30,
                },
                {"name": "gad", "method": {"name": "gad", "kl": 0.0, "std": False}, "steps": 100},
            ],
            "train": {**TRAIN, "lr": 1e-4, "prompts": 32},
        },
        {"stages": (12, 16)},
    ),
    Way(
        "token_opd",
        "probabilities",
        {"method": {"name": "token_opd"}, "train": {**TRAIN, "lr": 1e-3, "prompts": 128, "steps": 150}},
        {"steps": 30},
    ),
)


def recipe_of(way: Way, into: Path, quick: bool, prompts: int) -> recipes.Recipe:
    """The recipe of one way, as a user could have written it."""
    data = {
        "student": MODEL,
        "teachers": {"teacher": {"model": "world:teacher"}},
        "data": {"train": _sources("train", 512), "dev": _sources("test", prompts)},
        "reward": {"use": "task"},
        "speak": {"max_tokens": 24, "batch_rows": 256},
        "eval": {"every": 0, "keep": "last"},
        "run": {"dir": str(into), "name": way.name, "seed": 17, "save_every": 0, "threads": 1},
        **way.recipe,
    }
    if quick and "steps" in way.quick:
        data["train"] = {**data["train"], "steps": way.quick["steps"]}
    elif quick:
        data["stages"] = [{**s, "steps": n} for s, n in zip(data["stages"], way.quick["stages"], strict=True)]
        data["stages"][0]["critic"] = {"learn": True, "alone_steps": way.quick["stages"][0]}
    return recipes.build(data)


def _sources(split: str, n: int) -> list[dict[str, str]]:
    return [{"path": f"world:{d}:{n}", "split": split} for d in DOMAINS]


def show(*, quick: bool, into: Path, as_json: bool) -> list[dict[str, Any]]:
    """Run the three ways into folders below `into`, print the table, and write the report."""
    from opd.report import render
    from opd.train import train

    console = Console()
    into = fresh(into)
    rows, folders = [], []
    for way in WAYS:
        chosen = recipe_of(way, into, quick, 60 if quick else 200)
        if not as_json:
            console.rule(f"{way.name}: learns from the teacher's {way.knows}")
        with RunFolder.create(into, way.name) as folder, panel(quiet=as_json) as watch:
            summary = train(chosen, folder, base=Path.cwd(), origins={}, watch=watch)
        folders.append(into / way.name)
        rows.append({"method": way.name, "knows": way.knows, "run": str(into / way.name), **summary})
    teacher = ceiling(into, quick)
    place = render(folders, into / "report.html")
    if as_json:
        console.print_json(json.dumps({"teacher": teacher, "rows": rows, "report": str(place)}))
    else:
        console.print(table(rows, teacher))
        console.print(verdict(rows, teacher), soft_wrap=True, highlight=False)
        console.print(f"The report: {place.resolve()}", soft_wrap=True, highlight=False)
        console.print(f"next: opd samples {folders[-1]}", soft_wrap=True, highlight=False)
    return rows


def fresh(into: Path) -> Path:
    """A folder for this demo: runs are never overwritten, so an existing one gets a neighbour with a number."""
    number, place = 1, into
    while place.exists():
        number += 1
        place = into.with_name(f"{into.name}-{number}")
    place.mkdir(parents=True)
    return place


def ceiling(into: Path, quick: bool) -> dict[str, float]:
    """The teacher's own accuracy on the same prompts."""
    from opd.assemble import assemble
    from opd.eval import evaluate
    from opd.legs import legs

    chosen = recipe_of(WAYS[-1], into, quick, 60 if quick else 200)
    found = legs(chosen)
    parts = assemble(chosen, found, Path.cwd(), "cpu")
    model = parts.teachers.models["teacher"]
    return evaluate(model, parts.teachers, parts.dev, found[0].sampling, rewards=parts.rewards, seed=chosen.run.seed)


def table(rows: list[dict[str, Any]], teacher: Mapping[str, float]) -> Table:
    """Accuracy before and after with intervals, and what it cost."""
    title = "One student taught three ways: % right [95 % interval]; by domain: sampled"
    out = Table(title=title, box=None, pad_edge=False, padding=(0, 1, 0, 0), title_justify="left")
    for head in ("method", "greedy", "sampled"):
        out.add_column(head, no_wrap=True)
    for head in (*DOMAINS, "spoken", "learned", "s", "GFLOP"):
        out.add_column(head, justify="right", no_wrap=True)
    blank = ("", "", "", "")
    out.add_row("start", *_accuracies(rows[0]["before"]), *blank)
    for row in rows:
        tokens = (f"{row['tokens'][k] / 1000:.0f}k" for k in ("generated", "trained"))
        costs = (f"{row['seconds']:.0f}", f"{row['flops'] / 1e9:.0f}")
        out.add_row(row["method"], *_accuracies(row["after"]), *tokens, *costs)
    out.add_row("teacher", *_accuracies(teacher), *blank, style="dim")
    return out


def _accuracies(numbers: Mapping[str, float]) -> list[str]:
    whole = []
    for key in ("eval/accuracy", "eval/accuracy_sampled"):
        share, low, high = (100 * numbers[key + end] for end in ("", "_low", "_high"))
        whole.append(f"{share:.0f} [{low:.0f}-{high:.0f}]")
    return whole + [f"{100 * numbers[f'eval/{d}/accuracy_sampled']:.0f}" for d in DOMAINS]


def verdict(rows: list[dict[str, Any]], teacher: Mapping[str, float]) -> str:
    """What the table says, in a sentence a method, from its numbers alone."""
    key = "eval/accuracy_sampled"
    said = []
    for row in rows:
        gap = teacher[key] - row["before"][key]
        gain = row["after"][key] - row["before"][key]
        said.append(f"{row['method']} {'closed' if gain >= 0 else 'widened'} {abs(gain) / gap:.0%} of the gap")
    return "Sampled accuracy: " + "; ".join(said) + "."
