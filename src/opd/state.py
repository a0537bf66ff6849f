"""A run in memory, and what of it a checkpoint holds: enough to go on as if nothing had happened."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from opd import checkpoint, replay
from opd.assemble import Parts, model_path, optim
from opd.critic import Critics, critics
from opd.diagnose import Watchdog
from opd.errors import OpdError
from opd.legs import Leg
from opd.lock import differences
from opd.log import RunFolder, said_before
from opd.mixture import Mixture
from opd.model import CausalModel, load, trained
from opd.recipe import Recipe
from opd.replay import Replay
from opd.snapshot import load_weights
from opd.student import Optim, Student

Watch = Callable[[str, Mapping[str, Any]], None]
Weights = Mapping[str, torch.Tensor]


@dataclass
class Progress:
    """Where a run stands: all of its state that is not a tensor. Saved with every checkpoint."""

    step: int = 0  # of the run
    leg: int = 0
    leg_step: int = 0
    cursor: int = 0  # place in the stage's sequence of prompts
    height: float | None = None  # the best eval.metric since the student last went back to an earlier one
    version: int = 0
    critic_steps: int = 0
    critic_accuracy: float | None = None  # on fresh pairs, smoothed
    empty: int = 0  # steps in a row without one token to learn from
    best_step: int | None = None
    best_value: float | None = None
    best: dict[str, float] = field(default_factory=dict)  # the whole evaluation of that step
    evaluated: int = -1  # the last step that was evaluated
    generated: int = 0  # tokens
    learned: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    watchdog: dict[str, Any] = field(default_factory=dict)


@dataclass
class Run:
    """A run in memory."""

    recipe: Recipe
    legs: tuple[Leg, ...]
    parts: Parts
    folder: RunFolder
    student: Student
    critic: Critics | None
    at: Progress
    watch: Watch
    watchdog: Watchdog
    replay: Replay

    @property
    def leg(self) -> Leg:
        """The stage that runs; the last one when all have."""
        return self.legs[min(self.at.leg, len(self.legs) - 1)]

    @property
    def mixture(self) -> Mixture:
        """Which prompts the stage is asked, and when."""
        return self.parts.mixture.of(self.leg.stage.domains)

    def summary(self, status: str, reason: str = "") -> dict[str, Any]:
        """The content of summary.json."""
        at = self.at
        return {
            "status": status,
            "reason": reason,
            "method": self.legs[-1].method.name,
            "step": at.step,
            "before": at.before,
            "after": at.after,
            "best": {"step": at.best_step, "value": at.best_value},
            "tokens": {"generated": at.generated, "trained": at.learned},
            "seconds": at.seconds,
            "flops": at.flops,
        }


# --- out -------------------------------------------------------------------------------------------------------------


def save(run: Run) -> None:
    """Write a checkpoint of the run as it is now, and summary.json beside it."""
    at, module = run.at, run.student.model.module
    own = dict(trained(module))
    tensors: dict[str, Weights] = {
        "student": own,
        "student_optimizer": checkpoint.optimizer_tensors(run.student.optimizer, run.student.learned),
        "random": checkpoint.random_tensors(),
    }
    for critic in run.critic.members if run.critic else ():
        with critic.entered():
            learned = dict(trained(critic.learner))
            tensors[critic.model.name] = {k: v.detach().clone() for k, v in learned.items()}
            tensors[f"{critic.model.name}_optimizer"] = checkpoint.optimizer_tensors(critic.optimizer, learned)
    if run.replay.steps:
        tensors["replay"] = replay.tensors(run.replay)
    if maps := run.student.trainee.projectors.state_dict():
        tensors["projectors"] = maps
    reference = run.parts.teachers.reference
    if reference is not None:
        tensors["reference"] = _own_weights(reference)
    if run.parts.teachers.ema is not None:
        tensors["ema"] = _own_weights(run.parts.teachers.ema)
    state = {"progress": asdict(at), "offsets": run.folder.offsets()}
    protect = set() if at.best_step is None else {at.best_step}
    checkpoint.save(run.folder.checkpoints, at.step, tensors, state, keep=run.recipe.run.keep, protect=protect)
    run.folder.write_json("summary.json", run.summary("running"))


def _own_weights(model: CausalModel) -> Weights:
    if model.adapter is None:
        return dict(model.module.named_parameters())
    return {k: v for k, v in model.module.named_parameters() if f".{model.adapter}." in k}


# --- in --------------------------------------------------------------------------------------------------------------


def restore(run: Run, locked: Mapping[str, Any]) -> None:
    """Go back to the newest checkpoint, or where there is none to the beginning, with the record cut to it.

    `locked` is what lock.json would be now. Raises `OpdError` where a checkpoint is damaged, or where it, a model or
    the data is not the run's.
    """
    before = run.folder.read_json("lock.json") or {}
    notes = held_against(before, locked, run.folder.path)
    place = checkpoint.latest(run.folder.checkpoints)
    if place is None:  # killed before the first one: begin again, on an empty record
        run.folder.rewind(dict.fromkeys(run.folder.offsets(), 0))
        if before.get("origin"):
            begin_from(run, Path(before["origin"]))
    else:
        tensors, state = checkpoint.load(place)
        run.folder.rewind(state["offsets"])
        run.at = Progress(**state["progress"])
        run.watchdog = Watchdog(**run.at.watchdog)
        _restore_models(run, tensors, str(place))
        checkpoint.restore_random(tensors["random"])
    run.parts.teachers.heard.update(said_before(run.folder.path))
    run.folder.event(run.at.step, "resume", f"went on from step {run.at.step}")
    for note in notes:
        run.folder.event(run.at.step, "note", note)


def _restore_models(run: Run, tensors: Mapping[str, Weights], place: str) -> None:
    module, teachers = run.student.model.module, run.parts.teachers
    load_weights(module, tensors["student"], place)
    run.student.version = run.at.version
    run.student.trainee.projectors.take(tensors.get("projectors", {}), run.student.like)
    run.student.fresh_optimizer(optim(run.leg.stage.train))
    checkpoint.restore_optimizer(run.student.optimizer, run.student.learned, tensors["student_optimizer"])
    for role in ("reference", "ema"):
        if role in tensors:
            copy = run.student.model.frozen_copy(role)
            load_weights(copy.module, tensors[role], place, whole=False)
            setattr(teachers, role, copy)
    teachers.stage = run.leg.name
    if "critic" in tensors:
        run.critic = teachers.critic = new_critic(run)
        for critic in run.critic.members:
            with critic.entered():
                learner, name = critic.learner, critic.model.name
                load_weights(learner, tensors[name], place)
                checkpoint.restore_optimizer(critic.optimizer, dict(trained(learner)), tensors[f"{name}_optimizer"])
            critic.steps = run.at.critic_steps
    run.replay = replay.from_tensors(run.recipe.critic.replay, tensors.get("replay", {}))


def begin_from(run: Run, origin: Path) -> None:
    """Take the student's weights from a checkpoint of another run."""
    load_weights(run.student.model.module, checkpoint.load(origin)[0]["student"], str(origin))
    run.folder.event(0, "note", f"began with the student of {origin}")


def new_critic(run: Run) -> Critics:
    """The critic at its start. Its settings are the recipe's alone: stages share one critic, or one set of several."""
    settings, shared = run.recipe.critic, run.recipe.train
    chosen = Optim(
        lr=settings.lr,
        betas=shared.betas,
        eps=shared.eps,
        weight_decay=settings.weight_decay,
        clip=settings.clip or 0.0,
        tokens_per_micro=shared.tokens_per_micro,
    )
    start = None
    if settings.init != "student":
        student = run.recipe.student
        start = load(
            model_path(settings.init),
            dtype=student.dtype,
            device=run.student.model.device,
            trust_remote_code=student.trust_remote_code,
        )
    number = max(learned.objective.critics for leg in run.legs for learned in leg.method.loss.learned)
    seed = run.recipe.run.seed
    return critics(number, run.student.model, chosen, seed=seed, score_l2=settings.score_l2, start=start)


def held_against(before: Mapping[str, Any], now: Mapping[str, Any], folder: Path) -> list[str]:
    """lock.json of a run against the present one: sentences about versions that changed.

    Raises `OpdError` where a model, the data or the chat template is not what the run began with.
    """
    fixed = ("models", "hashes")
    changed = differences({k: before.get(k) for k in fixed}, {k: now.get(k) for k in fixed})
    if other := [key for key in changed if not key.endswith(".path")]:
        raise OpdError(
            f"{folder} cannot go on: {', '.join(other)} changed since it began, so it would become another run. "
            "Put them back, or begin a new run from its weights with --fork RUN@STEP"
        )
    noted = ("packages", "python", "platform", "processor", "threads", "device", "code")
    moved = differences({k: before.get(k) for k in noted}, {k: now.get(k) for k in noted})
    return [
        f"{key} changed{'' if key == 'code' else f' from {old} to {new}'}: the last bits of numbers may differ"
        for key, (old, new) in moved.items()
    ]
