"""Runs for tests: a small recipe, runs in this process, and runs in others that are killed."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from opd import checkpoint, recipe, runs, world
from opd import train as train_module
from opd.log import read, read_json
from opd.recipe import Recipe, Resolved

STREAMS = ("metrics", "samples", "answers")  # whose bytes a resume must reproduce
STAGES = [
    {
        "name": "warm-up",
        "method": "seqkd",
        "critic": {"learn": True, "alone_steps": 1, "group": 2},
        "steps": 3,
        "train": {"betas": [0.8, 0.9]},
    },
    {"name": "gad", "method": {"name": "gad", "group": 3, "kl": "linear(0.05, 0, 4)"}, "steps": 4},
]
BARE = {"eval": {"every": 0, "at_start": False, "length_band": None}, "data": {"train": "world:sort:14"}}


def small(parent: Path, name: str = "run", **changes: Any) -> Recipe:
    """Two stages with critic, reference, schedules, evaluations and a best checkpoint; sections are merged, `None`
    takes a key out."""
    data: dict[str, Any] = {
        "student": {"model": "world:student"},
        "teachers": {"teacher": {"model": "world:teacher"}},
        "critic": {"lr": 1e-3, "weight_decay": 0.01},
        "data": {"train": "world:sort:14", "dev": [{"path": "world:sort:6", "split": "dev"}]},
        "reward": {"use": "task"},
        "stages": STAGES,
        "speak": {"max_tokens": 10},
        "train": {"lr": 1e-3, "prompts": 4, "schedule": "cosine", "warmup_steps": 2, "weight_decay": 0.01},
        "eval": {"every": 2, "length_band": [0.01, 100]},
        "run": {"threads": 1, "dir": str(parent), "name": name, "save_every": 2, "keep": 2, "sample_rows": 3},
    }
    for key, change in changes.items():
        merged = isinstance(change, Mapping) and isinstance(data.get(key), Mapping)
        data[key] = {**data[key], **change} if merged and key != "reward" else change
    if "method" in data:
        data.pop("stages")
    return recipe.build({k: v for k, v in data.items() if v is not None})


def short(parent: Path, method: Any, steps: int = 3, name: str = "run", **changes: Any) -> Recipe:
    """One stage and no evaluation."""
    own: dict[str, Any] = {"train": {"lr": 1e-3, "prompts": 4, "steps": steps}, **BARE} | changes
    return small(parent, name, stages=[{"method": method}], **own)


def resolved(chosen: Recipe) -> Resolved:
    return Resolved(chosen, {}, recipe.dump(chosen))


def run(chosen: Recipe, base: Path | None = None, **how: Any) -> tuple[dict[str, Any], Path]:
    """Run a recipe in this process; returns the summary and the folder."""
    return runs.start(resolved(chosen), base or Path.cwd(), **how)


def resume(folder: Path, **how: Any) -> dict[str, Any]:
    return runs.start(None, None, resume=folder, **how)[0]


class CrashError(Exception):
    """What a test raises to stop a run where it stands, as a bug of somebody's would."""


def at_step(number: int, act: Callable[[], None]) -> Callable[[str, Mapping[str, Any]], None]:
    """A `watch` that acts when this step has been written."""

    def watch(kind: str, numbers: Mapping[str, Any]) -> None:
        if kind == "step" and numbers["step"] == number:
            act()

    return watch


def crash() -> None:
    raise CrashError


def opened(monkeypatch: Any) -> list[Any]:
    """The list that each `state.Run` of this process is put into before its first step."""
    found: list[Any] = []
    stages = train_module._stages

    def kept(run: Any, interrupt: Any) -> Any:
        found.append(run)
        return stages(run, interrupt)

    monkeypatch.setattr(train_module, "_stages", kept)
    return found


# --- what a run left -------------------------------------------------------------------------------------------------


def metrics(folder: Path, event: str | None = None) -> list[dict[str, Any]]:
    return [row for row in read(folder / "metrics.jsonl") if row.get("event") == event]


def events(folder: Path, *kinds: str) -> list[str]:
    return [row["message"] for row in read(folder / "events.jsonl") if not kinds or row["kind"] in kinds]


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "model" / "model.safetensors")


def saved(folder: Path) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The newest checkpoint: its tensors by group, and where the run stood, the time it took left out."""
    place = checkpoint.latest(folder / "checkpoints")
    assert place is not None
    tensors, state = checkpoint.load(place)
    return tensors, {k: v for k, v in state["progress"].items() if k != "seconds"}


def differences(one: Path, other: Path) -> list[str]:
    """Where two runs differ in what must not differ: record, final weights, state of the last checkpoint, summary."""
    found = [f"{s}.jsonl" for s in STREAMS if (one / f"{s}.jsonl").read_bytes() != (other / f"{s}.jsonl").read_bytes()]
    (tensors, state), (others, state_of_other) = saved(one), saved(other)
    found += [f"progress: {k}" for k, v in state.items() if v != state_of_other[k]]
    for what, (a, b) in {
        "model": (weights(one), weights(other)),
        **{f"checkpoint {k}": (v, others.get(k, {})) for k, v in tensors.items()},
    }.items():
        found += [f"{what}: {k}" for k in {*a, *b} if k not in a or k not in b or not a[k].equal(b[k])]
    said = [[row for row in read(f / "events.jsonl") if row["kind"] not in ("resume", "note")] for f in (one, other)]
    found += ["events"] * (said[0] != said[1])
    told = [{k: v for k, v in read_json(f / "summary.json").items() if k != "seconds"} for f in (one, other)]
    return found + ["summary"] * (told[0] != told[1])


# --- runs that are killed --------------------------------------------------------------------------------------------

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["opd.runs", "opd.train", "peft", "transformers.models.llama.modeling_llama"])


def begin(chosen: Recipe | None, folder: Path, trap: Callable[[], None] | None = None) -> Any:
    """A process that starts `chosen`, or resumes the run in `folder`. `trap` is called in it first."""
    text = None if chosen is None else recipe.dump(chosen)
    process = _CONTEXT.Process(target=_child, args=(text, str(folder), trap))
    process.start()
    return process


def _child(text: str | None, folder: str, trap: Callable[[], None] | None) -> None:
    os.setpgrp()
    if trap is not None:
        trap()
    if text is None:
        resume(Path(folder))
        return
    path = Path(folder).with_suffix(".yaml")
    path.write_text(text)
    runs.start(recipe.load([path]), Path.cwd())


def wait_for(ready: Callable[[], Any], seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.002)


def lines(folder: Path, stream: str = "metrics") -> int:
    path = folder / f"{stream}.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill(process: Any) -> None:
    process.kill()
    process.join()


def die_in_checkpoint(which: int) -> None:
    """A trap: this process is killed while it writes its checkpoint of this number, all files but DONE written."""
    seal, count = checkpoint.replace_file, [0]

    def replace_file(path: Path, content: bytes) -> None:
        count[0] += path.name == "DONE"
        if count[0] == which:
            os.kill(os.getpid(), signal.SIGKILL)
        seal(path, content)

    checkpoint.replace_file = replace_file


def answers(path: Path, count: int, each: int = 2, task: str = "sort") -> Path:
    """A file of `each` recorded answers to the first `count` prompts of a task of the built-in world."""
    rows = [
        {"prompt": p.text, "response": f"{p.answer}{'!' * k}"} for p in world.prompts(task, count) for k in range(each)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
