"""Starting, resuming and forking runs, and measuring their students: what the command line and Python both call."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd import recipe as recipes
from opd.errors import UsageError
from opd.lock import differences
from opd.log import RunFolder, read_json, said_before
from opd.recipe import Recipe, Resolved

if TYPE_CHECKING:
    from opd.state import Watch


def start(
    resolved: Resolved | None,
    base: Path | None,
    *,
    resume: Path | None = None,
    fork: str | None = None,
    watch: Watch | None = None,
) -> tuple[dict[str, Any], Path]:
    """Run to the end; returns the summary and the run folder.

    `resume` goes on with a run by its own recipe; a recipe beside it must be the same. `fork` ("RUN@STEP") begins a new
    run of `resolved` from the student's weights of another run's checkpoint. An existing run is never overwritten, and
    one that stops before it has recorded its recipe leaves no folder.
    """
    if resume is not None:
        own, place = recorded(resume)
        if resolved is not None:
            _must_agree(resume, own.recipe, resolved.recipe)
        from opd.train import train

        with RunFolder.open(resume) as folder:
            return train(own.recipe, folder, base=place, resume=True, watch=watch), folder.path
    assert resolved is not None and base is not None
    chosen = resolved.recipe
    origin = forked(fork) if fork else None
    from opd.legs import legs

    legs(chosen, base)  # what cannot work is refused before torch is loaded
    from opd.train import train

    with RunFolder.create(Path(chosen.run.dir), chosen.run.name or "", chosen.stages[-1].method.name) as folder:
        try:
            summary = train(chosen, folder, base=base, origins=resolved.origins, watch=watch, origin=origin)
        except BaseException:
            folder.discard(unless="recipe.yaml")
            raise
        return summary, folder.path


def recorded(run: Path) -> tuple[Resolved, Path]:
    """A run's own recipe, and the folder that its functions are looked for in."""
    path = RunFolder.open(run).path
    locked = read_json(path / "lock.json")
    if not (path / "recipe.yaml").is_file() or locked is None:
        raise UsageError(
            f"{run} holds no recipe: it is no run of opd, or it ended before its first step. There is nothing to go on "
            "from; start again from the recipe"
        )
    return recipes.load([path / "recipe.yaml"]), Path(locked["base"])


def _must_agree(run: Path, own: Recipe, other: Recipe) -> None:
    if changed := differences(own.model_dump(mode="json"), other.model_dump(mode="json")):
        said = ", ".join(f"{key} is {old!r} there and {new!r} here" for key, (old, new) in changed.items())
        raise UsageError(
            f"{run} was begun with another recipe: {said}. A run goes on with its own: leave the recipe and its "
            f"overrides out, or begin a new run from its weights with --fork {run}"
        )


def forked(spec: str) -> Path:
    """The checkpoint that RUN@STEP names (without a step, the newest)."""
    from opd import checkpoint

    name, at, step = spec.rpartition("@")
    if not at or Path(spec).is_dir():
        name, step = spec, ""
    found = checkpoint.complete(RunFolder.open(Path(name)).checkpoints)
    if not found:
        raise UsageError(f"{name} has no complete checkpoint to fork from")
    if step and (not step.isdecimal() or int(step) not in found):
        raise UsageError(f"{name} has no checkpoint of step {step}; there are {', '.join(map(str, found))}")
    return found[int(step) if step else max(found)]


def measure(place: Path, overrides: Sequence[str] = ()) -> dict[str, float]:
    """`eval/...` of a run's final student, or of a recipe's student before training."""
    run = place if place.is_dir() else None
    resolved, base = recorded(place) if run else (recipes.load([place]), place.resolve().parent)
    if overrides:
        resolved = recipes.load([place / "recipe.yaml" if run else place], list(overrides))
    chosen = resolved.recipe
    if not chosen.data.dev:
        raise UsageError(f"{place} has no data.dev to measure on: add `data.dev=PATH`")
    if run:
        if not (run / "model" / "config.json").is_file():
            raise UsageError(f"{run} has no finished model yet: its training has not ended; `opd train --resume {run}`")
        final = {"model": str(run / "model"), "lora": None, "drop_layers": 0}
        chosen = chosen.model_copy(update={"student": chosen.student.model_copy(update=final)})
    return _evaluated(chosen, base, run)


def _evaluated(chosen: Recipe, base: Path, run: Path | None) -> dict[str, float]:
    from opd.assemble import assemble, device_of
    from opd.legs import legs, text_role

    found = legs(chosen, base)  # what cannot work is refused before torch is loaded
    import torch

    from opd.eval import evaluate

    if chosen.run.threads:
        torch.set_num_threads(chosen.run.threads)
    parts = assemble(chosen, found, base, device_of(chosen))
    parts.teachers.heard.update(said_before(RunFolder.open(run).path) if run else {})
    return evaluate(
        parts.student,
        parts.teachers,
        parts.dev,
        found[-1].sampling,
        rewards=parts.rewards,
        text_role=text_role(chosen, found),
        greedy=chosen.eval.greedy,
        sampled=chosen.eval.sampled,
        samples=chosen.eval.samples,
        seed=chosen.run.seed,
        rows=chosen.speak.batch_rows,
    )
