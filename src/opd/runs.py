"""Starting, resuming and forking runs, and measuring their students: what the command line and Python both call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opd import recipe as recipes
from opd.errors import UsageError
from opd.log import RunFolder, read_json
from opd.recipe import Resolved
from opd.train import Watch, train


def start(
    resolved: Resolved | None,
    base: Path | None,
    *,
    resume: Path | None = None,
    fork: str | None = None,
    watch: Watch | None = None,
) -> tuple[dict[str, Any], Path]:
    """Run to the end; returns the summary and the run folder.

    `resume` goes on with a run by its own recipe. `fork` ("RUN@STEP") begins a new run of `resolved` from the student's
    weights of another run's checkpoint. An existing run is never overwritten.
    """
    if resume is not None:
        with RunFolder.open(resume) as folder:
            own = recipes.load([resume / "recipe.yaml"])
            place = Path(read_json(resume / "lock.json")["base"])
            return train(own.recipe, folder, base=place, resume=True, watch=watch), folder.path
    assert resolved is not None and base is not None
    chosen = resolved.recipe
    origin = forked(fork) if fork else None
    with RunFolder.create(Path(chosen.run.dir), chosen.run.name or "", chosen.stages[-1].method.name) as folder:
        summary = train(chosen, folder, base=base, origins=resolved.origins, watch=watch, origin=origin)
        return summary, folder.path


def forked(spec: str) -> Path:
    """The checkpoint that RUN@STEP names (without a step, the newest)."""
    from opd import checkpoint

    name, _, step = spec.partition("@")
    found = checkpoint.complete(RunFolder.open(Path(name)).checkpoints)
    if not found:
        raise UsageError(f"{name} has no complete checkpoint to fork from")
    if step and (not step.isdecimal() or int(step) not in found):
        raise UsageError(f"{name} has no checkpoint of step {step}; there are {', '.join(map(str, found))}")
    return found[int(step) if step else max(found)]


def measure(place: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """`eval/...` of a run's final student, or of a recipe's student before training."""
    from opd.assemble import assemble, legs
    from opd.eval import evaluate
    from opd.types import Says

    run = place if place.is_dir() else None
    resolved = recipes.load([place / "recipe.yaml" if run else place], list(overrides))
    base = Path(read_json(place / "lock.json")["base"]) if run else place.resolve().parent
    chosen = resolved.recipe
    found = legs(chosen, base)
    parts = assemble(chosen, found, base, "cpu" if chosen.run.device == "auto" else chosen.run.device)
    if not parts.dev:
        raise UsageError(f"{place} has no data.dev to measure on: add `data.dev`")
    if run:
        from opd.model import load

        if not (run / "model" / "config.json").is_file():
            raise UsageError(f"{run} has no finished model yet: its training has not ended; `opd train --resume {run}`")
        trained = load(run / "model", dtype=chosen.student.dtype, vocab=parts.student.head.vocab, frozen=True)
        parts.teachers.student = parts.student = trained
    role = next((j.role for leg in found for j, s in leg.method.needs.items() if s is Says.TEXT), None)
    return evaluate(
        parts.student,
        parts.teachers,
        parts.dev,
        found[-1].sampling,
        rewards=parts.rewards,
        text_role=role,
        samples=chosen.eval.samples,
        seed=chosen.run.seed,
        rows=chosen.speak.batch_rows,
    )
