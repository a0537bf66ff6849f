"""Methods on the built-in world: accuracy at the start and the end, what it cost, what the critic saw.

    python bench/world.py --make 1 2 3 4                       # teachers and students of other seeds
    python bench/world.py --methods gad seqkd --seeds 0 1 2    # train; finished cells are skipped
    python bench/world.py --methods gad --set train.lr=3e-5 --label lr-3e-5
    python bench/world.py --table [--methods gad ...]

A cell is a method, a task, a seed (of teacher, start and order) and settings that differ from the method's; it is one
line of results/world.jsonl, named by what would change it. One process, one thread. Accuracies are shares of prompts
answered right: greedy, and the mean of `SAMPLES` samples at temperature 1. Searches read the dev split, `--split test`
is for final numbers.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import re
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from opd import recipe as recipes
from opd.tasks import DOMAINS

RESULTS = Path(__file__).parent / "results" / "world.jsonl"
WORLDS = Path("build/worlds")
TASKS: dict[str, tuple[str, ...]] = {"mixture": DOMAINS, **{d: (d,) for d in DOMAINS}}
PROMPTS = {"dev": 200, "test": 450}  # asked in an evaluation, over all domains of the task
SAMPLES = 4
SHORTER = {"teacher": 0.5, "student": 0.8}  # of the steps of `opd.world.make`, for worlds of other seeds

Json = dict[str, Any]
TRAIN: Json = {"schedule": "linear", "final_lr_share": 0.05, "warmup_steps": 5, "weight_decay": 0.01}
ON_POLICY: Json = {**TRAIN, "prompts": 128, "steps": 150}


def _gad(**settings: Any) -> Json:
    one = {"name": "gad", "kl": 0.0, **settings}
    return {
        "critic": {"lr": 1e-3, "weight_decay": 0.01},
        "stages": [
            {"name": "warm-up", "method": dict(one), "critic": {"alone_steps": 30}, "steps": 30},
            {"name": "gad", "method": dict(one), "steps": 120},
        ],
        "train": {**TRAIN, "lr": 1e-4, "prompts": 32, "tokens_per_micro": 16384},
    }


METHODS: dict[str, Json] = {
    "seqkd": {"method": {"name": "seqkd"}, "train": {**TRAIN, "lr": 2e-4, "prompts": 64, "steps": 400}},
    "gkd": {
        "method": {"name": "gkd", "on_policy": 1.0, "divergence": "reverse_kl"},
        "train": {**ON_POLICY, "lr": 1e-3},
    },
    "token_opd": {"method": {"name": "token_opd"}, "train": {**ON_POLICY, "lr": 1e-3}},
    "grpo": {"method": {"name": "grpo"}, "train": {**TRAIN, "lr": 3e-4, "prompts": 32, "steps": 120}},
    "gad": _gad(),  # credit divided by the group's deviation, as in the paper
    "gad_small": _gad(std=False),
    "gad_able_critic": _gad(std=False),
}


@dataclass(frozen=True)
class Cell:
    """One run. `key` names it by everything that its result depends on, but the code."""

    method: str
    task: str
    seed: int
    split: str
    settings: tuple[tuple[str, Any], ...] = ()

    @property
    def label(self) -> str:
        return " ".join([self.method, *(f"{k}={v}" for k, v in self.settings)])

    def recipe(self, worlds: Path, runs: Path) -> Json:
        """The recipe as plain data."""
        domains = TASKS[self.task]
        each = PROMPTS[self.split] // len(domains)
        where = lambda name: f"world:{name}" if self.seed == 0 else str(worlds / f"seed{self.seed}" / name)
        data: Json = {
            "student": {"model": where("student")},
            "teachers": {"teacher": {"model": where("teacher")}},
            "data": {
                "train": [{"path": f"world:{d}:512"} for d in domains],
                "dev": [{"path": f"world:{d}:{each}", "split": self.split, "domain": d} for d in domains],
            },
            "reward": {"use": "task"},
            "speak": {"max_tokens": 24, "batch_rows": 256},
            "eval": {"every": 0, "keep": "last", "samples": SAMPLES},
            "run": {"seed": 17 + self.seed, "save_every": 0, "threads": 1, "sample_rows": 32, "dir": str(runs)},
            **copy.deepcopy(METHODS[self.method]),
        }
        if self.method == "gad_able_critic":  # begins as a model that knows the tasks and is not this teacher
            data["critic"]["init"] = "world:teacher" if self.seed == 1 else str(worlds / "seed1" / "teacher")
        for path, value in self.settings:
            _put(data, path.split("."), value)
        return data

    @property
    def key(self) -> str:
        text = json.dumps([self.task, self.seed, self.split, self.recipe(Path("w"), Path("r"))], sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def _put(data: Any, path: Sequence[str], value: Any) -> None:
    """Set a value by its dotted place; `stages.*.x` sets it in every stage."""
    if path[0] == "*":
        for item in data:
            _put(item, path[1:], value)
        return
    place: Any = int(path[0]) if isinstance(data, list) else path[0]
    if len(path) == 1:
        data[place] = value
    else:
        _put(data.setdefault(place, {}) if isinstance(data, dict) else data[place], path[1:], value)


# --- one cell --------------------------------------------------------------------------------------------------------


def measure(cell: Cell, worlds: Path) -> Json:
    """Train a cell in a folder that is thrown away, and what came of it."""
    from opd.log import RunFolder
    from opd.train import train

    into = Path(tempfile.mkdtemp(prefix="world-"))
    began = time.process_time()
    try:
        with RunFolder.create(into, "cell") as folder:
            summary = train(recipes.build(cell.recipe(worlds, into)), folder, base=Path.cwd())
        if summary["reason"] == "interrupted":
            raise KeyboardInterrupt
        read = lambda name: [json.loads(line) for line in (into / "cell" / name).read_text().splitlines()]
        metrics, samples = read("metrics.jsonl"), read("samples.jsonl")
        events = [e for e in read("events.jsonl") if e["kind"] in ("warning", "stop")]
    finally:
        shutil.rmtree(into)
    last = [m for m in metrics if "event" not in m][-20:]
    mean = lambda name: statistics.fmean(x) if (x := [m[name] for m in last if name in m]) else None
    seen = ("critic/accuracy", "critic/margin", "length/ratio", "entropy/student_nats", "group/degenerate_share")
    return {
        "key": cell.key,
        "label": cell.label,
        "method": cell.method,
        "task": cell.task,
        "seed": cell.seed,
        "split": cell.split,
        "settings": dict(cell.settings),
        "prompts": PROMPTS[cell.split],
        "status": summary["status"],
        "reason": summary["reason"],
        "steps": summary["step"],
        "tokens": summary["tokens"],
        "wall_s": round(summary["seconds"], 1),
        "cpu_s": round(time.process_time() - began, 1),
        "before": _accuracies(summary["before"], cell),
        "after": _accuracies(summary["after"], cell),
        "curve": [{"step": m["step"], **_accuracies(m, cell)} for m in metrics if m.get("event") == "eval"],
        "last_steps": {name: round(value, 4) for name in seen if (value := mean(name)) is not None},
        "errors": _errors(samples, summary["step"]),
        "events": [[e["step"], e["message"]] for e in events],
    }


def _accuracies(numbers: Mapping[str, float], cell: Cell) -> Json:
    domains = TASKS[cell.task]
    prefix = lambda d: f"eval/{d}" if len(domains) > 1 else "eval"
    pair = lambda p: [round(numbers[f"{p}/accuracy"], 4), round(numbers[f"{p}/accuracy_sampled"], 4)]
    out: Json = {d: pair(prefix(d)) for d in domains}
    auc = "heldout_right_over_wrong"
    names = {"critic/heldout_accuracy": "critic_accuracy", f"critic/{auc}": "critic_auc"}
    names |= {f"critic/{d}/{auc}": f"critic_auc_{d}" for d in domains}
    return out | {short: round(numbers[name], 4) for name, short in names.items() if name in numbers}


def _errors(samples: Sequence[Json], steps: int) -> Json:
    """Shares of samples by what is wrong with them, per domain: [first tenth of the run, last tenth]."""
    found: Json = {}
    tenth = max(1, steps // 10)
    for place, chosen in enumerate((lambda s: s <= tenth, lambda s: s > steps - tenth)):
        for domain in DOMAINS:
            rows = [r for r in samples if chosen(r["step"]) and r["domain"] == domain and r["speaker"] == "student"]
            for kind in (kinds := [flaw(r["prompt"], r["text"], r["finish"]) for r in rows]):
                shares = found.setdefault(domain, {}).setdefault(kind, [0.0, 0.0])
                shares[place] = round(kinds.count(kind) / len(kinds), 3)
    return found


def flaw(prompt: str, text: str, finish: str) -> str:
    """What is wrong with an answer of the built-in world, in a word; `right` if nothing is."""
    from opd.tasks import task_of

    if finish == "length":
        return "endless"
    if task_of(prompt).check(prompt, text):
        return "right"
    asked = re.sub(r"[,>]", "", prompt[1:])
    said = text if prompt[0] != "r" else re.sub(r"[^a-z0-9]", "", text)
    if set(said) - set(asked):
        return "stranger"
    more = any(said.count(c) > asked.count(c) for c in set(said))
    less = any(said.count(c) < asked.count(c) for c in set(asked))
    if more:
        return "twice and missing" if less else "twice"
    return "missing" if less else ("order" if prompt[0] != "r" else "style")


def teacher_of(seed: int, split: str, worlds: Path) -> Json:
    """The teacher's own accuracies on the same prompts."""
    from opd.assemble import assemble
    from opd.eval import evaluate
    from opd.legs import legs

    cell = Cell("token_opd", "mixture", seed, split)
    chosen = recipes.build(cell.recipe(worlds, worlds))
    found = legs(chosen)
    parts = assemble(chosen, found, Path.cwd(), "cpu")
    model = parts.teachers.models["teacher"]
    numbers = evaluate(
        model, parts.teachers, parts.dev, found[0].sampling, rewards=parts.rewards, samples=SAMPLES, seed=seed
    )
    about = {"method": "teacher", "label": "teacher", "task": "mixture", "seed": seed, "split": split, "settings": {}}
    return {"key": f"teacher-{seed}-{split}", **about, "after": _accuracies(numbers, cell)}


def make(seed: int, worlds: Path) -> None:
    """A teacher and a student of another seed, by the plans of `opd.world.make` with fewer steps (`SHORTER`)."""
    from opd.world.make import PLANS, save, train

    for plan in PLANS:
        out = worlds / f"seed{seed}" / plan.name
        if plan.name in SHORTER and not (out / "model.safetensors").is_file():
            out.parent.mkdir(parents=True, exist_ok=True)
            save(*train(plan, seed, round(plan.steps * SHORTER[plan.name])), out)


# --- tables ----------------------------------------------------------------------------------------------------------


def results() -> list[Json]:
    """Every finished cell."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in per cent."""
    mean = 100 * statistics.fmean(values)
    return f"{mean:.1f}" + (f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else "")


def gain(before: float, after: float, n: int) -> tuple[float, float, float]:
    """The difference of two shares with a 95 % interval, as if of different prompts: wider than of the same ones."""
    half = 1.96 * math.sqrt((before * (1 - before) + after * (1 - after)) / n)
    return after - before, after - before - half, after - before + half


def table(rows: Iterable[Json]) -> str:
    """Markdown: a line a label, over its seeds; greedy / sampled by domain, and how often the critic ranks a right
    answer above a wrong one to the same prompt."""
    groups: dict[tuple[str, str, str], list[Json]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["split"], row["label"]), []).append(row)
    head = ["method", "task, split", "seeds", *(f"{d} start" if s else f"{d}" for d in DOMAINS for s in (1, 0))]
    head += [f"critic AUC ({', '.join(DOMAINS)})", "sampled tok", "trained tok", "CPU-s"]
    lines = [head, ["---"] * len(head)]
    for (task, split, label), found in sorted(groups.items()):
        found.sort(key=lambda r: r["seed"])
        line = [label, f"{task}, {split}", " ".join(str(r["seed"]) for r in found)]
        for d in DOMAINS:
            for when in ("before", "after"):
                shown = [r[when][d] for r in found if d in r.get(when, {})]
                line.append(" / ".join(spread([s[i] for s in shown]) for i in (0, 1)) if shown else "")
        aucs = [[r["after"].get(f"critic_auc_{d}", math.nan) for r in found] for d in DOMAINS]
        seen = [f"{statistics.fmean(a):.2f}" for a in aucs if not math.isnan(statistics.fmean(a))]
        line.append(" ".join(seen))
        for kind in ("generated", "trained"):
            counts = [r["tokens"][kind] / 1000 for r in found if "tokens" in r]
            line.append(f"{statistics.fmean(counts):.0f}k" if counts else "")
        cpu = [r["cpu_s"] for r in found if "cpu_s" in r]
        lines.append([*line, f"{statistics.fmean(cpu):.0f}" if cpu else ""])
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def by_seed(rows: Iterable[Json]) -> str:
    """Markdown: a line a cell and domain; the gain over the start with its 95 % interval, greedy and sampled."""
    head = ("method", "task, split", "seed", "domain", "start", "end", "gain, greedy [95 %]", "gain, sampled [95 %]")
    lines: list[Sequence[Any]] = [head, ["---"] * len(head)]
    for row in sorted(rows, key=lambda r: (r["label"], r["task"], r["split"], r["seed"])):
        for d in TASKS[row["task"]] if "before" in row else ():
            a, b = row["before"][d], row["after"][d]
            each = row["prompts"] // len(TASKS[row["task"]])
            gains = [[100 * x for x in gain(a[i], b[i], each)] for i in (0, 1)]
            said = [f"{up:+.1f} [{low:+.1f}, {high:+.1f}]" for up, low, high in gains]
            start, end = (f"{100 * x[0]:.1f} / {100 * x[1]:.1f}" for x in (a, b))
            lines.append((row["label"], f"{row['task']}, {row['split']}", row["seed"], d, start, end, *said))
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def _value(text: str) -> Any:
    try:
        return float(text) if not text.isdigit() else int(text)
    except ValueError:
        return yaml.safe_load(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=[], choices=[*METHODS, "teacher"])
    parser.add_argument("--task", default="mixture", choices=TASKS)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--split", default="dev", choices=PROMPTS)
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings, `stages.*.method.kl=0.1`")
    parser.add_argument("--worlds", type=Path, default=WORLDS, help="folder of the worlds of other seeds")
    parser.add_argument("--make", nargs="+", type=int, default=[], metavar="SEED")
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        rows = [r for r in results() if not args.methods or r["method"] in args.methods]
        print(table(rows), by_seed(rows), sep="\n\n")
        return
    import torch

    torch.set_num_threads(1)
    for seed in args.make:
        make(seed, args.worlds)
    known = {row["key"] for row in results()}
    settings = tuple((k, _value(v)) for k, v in (each.split("=", 1) for each in args.set))
    for seed in args.seeds:
        for method in args.methods:
            key = f"teacher-{seed}-{args.split}" if method == "teacher" else ""
            cell = Cell(method if not key else "gad", args.task, seed, args.split, settings)
            if (key or cell.key) in known:
                continue
            row = teacher_of(seed, args.split, args.worlds) if key else measure(cell, args.worlds)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as file:
                file.write(json.dumps(row) + "\n")
            print(
                json.dumps({k: row.get(k) for k in ("label", "seed", "before", "after", "cpu_s", "wall_s")}), flush=True
            )


if __name__ == "__main__":
    main()
