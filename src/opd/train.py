"""The loop: stages of steps, evaluations, checkpoints. One step is a straight line; everything else is around it."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from opd import checkpoint, record
from opd import rewards as scoring
from opd.assemble import Leg, Parts, assemble, legs, optim, plan
from opd.batch import pack
from opd.critic import Critic, beside
from opd.diagnose import Watchdog
from opd.errors import OpdError
from opd.eval import LOWER_IS_BETTER, evaluate
from opd.interrupt import Interrupt
from opd.log import RunFolder
from opd.model import CausalModel, load, trained
from opd.recipe import Recipe
from opd.speak import speak
from opd.student import NotFiniteError, Optim, Student
from opd.types import Says

Watch = Callable[[str, Mapping[str, Any]], None]


@dataclass
class Progress:
    """Where a run stands: all of its state that is not a tensor. Saved with every checkpoint."""

    step: int = 0  # of the run
    leg: int = 0
    leg_step: int = 0
    cursor: int = 0  # prompts drawn
    version: int = 0
    critic_steps: int = 0
    empty: int = 0  # steps in a row without one token to learn from
    best_step: int | None = None
    best_value: float | None = None
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
    critic: Critic | None
    at: Progress
    watch: Watch
    watchdog: Watchdog

    @property
    def leg(self) -> Leg:
        return self.legs[self.at.leg]


def train(
    recipe: Recipe,
    folder: RunFolder,
    *,
    base: Path,
    origins: Mapping[str, str] | None = None,
    resume: bool = False,
    watch: Watch | None = None,
    interrupt: Interrupt | None = None,
    origin: Path | None = None,
) -> dict[str, Any]:
    """Run a recipe to its end in `folder`, or on from its newest checkpoint; returns summary.json.

    `origin` is a checkpoint of another run whose student weights this one begins with.
    `base` is the folder that the recipe's paths are relative to. `watch(kind, numbers)` is told of every step,
    evaluation and warning. The first interrupt finishes the step, saves and stops; a second stops at once.

    Raises `OpdError` with a sentence when the run cannot go on; its checkpoints and its record stay.
    """
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    torch.manual_seed(recipe.run.seed)
    run = _open(recipe, folder, base, origins or {}, resume, watch or (lambda _kind, _numbers: None))
    if origin is not None and not resume:
        _load_into(run.student.model.module, checkpoint.load(origin)[0]["student"])
        folder.event(0, "note", f"began with the student of {origin}")
    interrupt = interrupt or Interrupt()
    status, reason = "failed", ""
    try:
        with interrupt:
            status, reason = _stages(run, interrupt)
    except BaseException as error:
        reason = str(error) or type(error).__name__
        with suppress(OpdError):
            folder.event(run.at.step, "stop", reason)
        raise
    finally:
        summary = _summary(run, status, reason)
        with suppress(OpdError):
            folder.write_json("summary.json", summary)
    return summary


# --- opening ---------------------------------------------------------------------------------------------------------


def _open(recipe: Recipe, folder: RunFolder, base: Path, origins: Mapping[str, str], resume: bool, watch: Watch) -> Run:
    found = legs(recipe, base)
    device = recipe.run.device if recipe.run.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    parts = assemble(recipe, found, base, device)
    student = Student(parts.student, optim(found[0].stage.train))
    run = Run(recipe, found, parts, folder, student, None, Progress(), watch, Watchdog())
    if resume:
        _restore(run)
    else:
        record.begin(folder, recipe, origins, plan(recipe, found), parts, base, device)
    return run


def _restore(run: Run) -> None:
    place = checkpoint.latest(run.folder.checkpoints)
    if place is None:  # killed before the first one: begin again, on an empty record
        run.folder.rewind(dict.fromkeys(run.folder.offsets(), 0))
        return
    tensors, state = checkpoint.load(place)
    run.folder.rewind(state["offsets"])
    run.at = Progress(**state["progress"])
    run.watchdog = Watchdog(**run.at.watchdog)
    _load_into(run.student.model.module, tensors["student"])
    run.student.version = run.at.version
    if run.at.leg < len(run.legs):
        run.student.fresh_optimizer(optim(run.leg.stage.train))
        if "student_optimizer" in tensors:
            names = dict(trained(run.student.model.module))
            checkpoint.restore_optimizer(run.student.optimizer, names, tensors["student_optimizer"])
    if "reference" in tensors:
        run.parts.teachers.reference = run.student.model.frozen_copy("reference")
        _load_into(run.parts.teachers.reference.module, tensors["reference"])
    if "critic" in tensors:
        run.critic = run.parts.teachers.critic = _new_critic(run)
        with run.critic.entered():
            learner = run.critic.learner
            _load_into(learner, tensors["critic"])
            checkpoint.restore_optimizer(run.critic.optimizer, dict(trained(learner)), tensors["critic_optimizer"])
        run.critic.steps = run.at.critic_steps
    checkpoint.restore_random(tensors["random"])
    run.folder.event(run.at.step, "resume", f"went on from the checkpoint of step {run.at.step}")


def _load_into(module: torch.nn.Module, group: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        own = dict(module.named_parameters())
        for name, tensor in group.items():
            own[name].copy_(tensor)


# --- stages ----------------------------------------------------------------------------------------------------------


def _stages(run: Run, interrupt: Interrupt) -> tuple[str, str]:
    """Every stage to its end; returns the status and, when stopped early, why."""
    at, recipe = run.at, run.recipe
    if at.step == 0 and recipe.eval.at_start and at.evaluated < 0:
        _evaluate(run)
    while at.leg < len(run.legs):
        steps = run.leg.steps(run.parts.mixture.size)
        if at.leg_step == 0:
            _begin_stage(run, steps)
        while at.leg_step < steps:
            started = time.perf_counter()
            stop = _one(run, steps)
            at.seconds += time.perf_counter() - started
            due = recipe.eval.every and at.step % recipe.eval.every == 0
            if due and at.leg_step < steps:
                _evaluate(run)
            if stop is None and run.watchdog.collapsed(run.at.before, run.at.after):
                stop = run.watchdog.reason
            saved = recipe.run.save_every and at.step % recipe.run.save_every == 0
            if interrupt.asked or stop is not None or saved:
                _save(run)
            if stop is not None:
                return _finish(run, "stopped", stop)
            if interrupt.asked:
                run.folder.event(at.step, "stop", "interrupted; the step was finished and saved")
                return "stopped", "interrupted"
        at.leg, at.leg_step = at.leg + 1, 0
        _evaluate(run)
        _save(run)
    return _finish(run, "finished", "")


def _begin_stage(run: Run, steps: int) -> None:
    leg, teachers = run.leg, run.parts.teachers
    run.student.fresh_optimizer(optim(leg.stage.train))
    if any(j.role == "reference" for j in leg.method.needs):
        teachers.reference = run.student.model.frozen_copy("reference")
    if leg.method.loss.learned and run.critic is None:
        run.critic = teachers.critic = _new_critic(run)
    words = f"stage `{leg.name}`: {leg.method.loss}, {steps} steps"
    run.folder.event(run.at.step, "stage", words)
    run.watch("stage", {"name": leg.name, "steps": steps, "equation": str(leg.method.loss)})


def _new_critic(run: Run) -> Critic:
    settings, own = run.recipe.critic, run.leg.stage.train
    chosen = Optim(
        lr=settings.lr,
        betas=own.betas,
        eps=own.eps,
        weight_decay=settings.weight_decay,
        clip=settings.clip or 0.0,
        tokens_per_micro=own.tokens_per_micro,
    )
    start = None
    if settings.init != "student":
        from opd.assemble import model_path

        start = load(model_path(settings.init), dtype=run.recipe.student.dtype, device=run.student.model.device)
    return beside(run.student.model, chosen, seed=run.recipe.run.seed, score_l2=settings.score_l2, start=start)


# --- one step --------------------------------------------------------------------------------------------------------


def learning_rate(leg: Leg, step: int, steps: int) -> float:
    """The schedule of a stage: linear warm-up, then constant, or a fall to `final_lr_share` of the peak."""
    own = leg.stage.train
    if step < own.warmup_steps:
        return own.lr * (step + 1) / own.warmup_steps
    share = (step - own.warmup_steps) / max(1, steps - own.warmup_steps)
    low = own.final_lr_share
    match own.schedule:
        case "linear":
            return own.lr * (low + (1 - low) * (1 - share))
        case "cosine":
            return own.lr * (low + (1 - low) * (1 + math.cos(math.pi * share)) / 2)
        case _:
            return own.lr


def _one(run: Run, steps: int) -> str | None:
    """One step; returns why the run should stop, or None."""
    at, leg, recipe, teachers = run.at, run.leg, run.recipe, run.parts.teachers
    clock = [time.perf_counter()]
    tick = lambda: clock.append(time.perf_counter())
    own = leg.stage.train

    prompts = run.parts.mixture.prompts(at.cursor, own.prompts)
    rollouts = speak(
        prompts,
        leg.method,
        student=run.student,
        teachers=teachers,
        sampling=leg.sampling,
        seed=recipe.run.seed,
        step=at.step,
        cursor=at.cursor,
        rows=recipe.speak.batch_rows,
    )
    if "reward" in leg.method.loss.reads:
        rollouts = [r for r in scoring.score(run.parts.rewards, rollouts) if r.reward is not None]
    tick()
    dtype = torch.float64 if run.student.model.compute == torch.float64 else torch.float32
    batch = pack(rollouts, temperature=leg.sampling.temperature, device=run.student.model.device, dtype=dtype)
    batch = teachers.hear(batch, leg.method.needs)
    tick()
    lr = learning_rate(leg, at.leg_step, steps)
    stats: dict[str, float] = {}
    waits = at.leg_step < leg.stage.critic.alone_steps or run.watchdog.student_waits
    if not waits:
        try:
            stats = run.student.update(batch, leg.method.loss, at.leg_step, lr)
        except NotFiniteError as error:
            kept = record.keep_rollouts(run.folder, at.step + 1, rollouts)
            raise OpdError(f"step {at.step + 1}, stage `{leg.name}`: {error}; its rollouts are in {kept}") from error
        stats["lr/student"] = lr
    for learned in leg.method.loss.learned:
        assert run.critic is not None
        pairs = teachers.pairs(rollouts, learned.objective.good)
        if learned.fixed:
            ranks = run.critic.ranks(run.critic.score(pairs.rows), pairs)
        else:
            ranks = run.critic.update(pairs, learned.objective, run.critic.optim.lr)
            for _ in range(recipe.critic.steps - 1):
                run.critic.update(pairs, learned.objective, run.critic.optim.lr)
        stats |= ranks | record.critic_view(rollouts, teachers, learned.objective.good)
    tick()
    at.step, at.leg_step, at.cursor = at.step + 1, at.leg_step + 1, at.cursor + own.prompts
    at.version = run.student.version
    at.critic_steps = run.critic.steps if run.critic else 0
    stats |= record.describe(batch, leg.method)
    at.generated += int(stats["tokens/generated"])
    at.learned += 0 if waits else int(stats["tokens/trained"])
    at.flops += record.flops(run.student.model, run.critic, teachers, leg.method, batch, learning=not waits)
    _write(run, batch, rollouts, stats, clock)
    return _guard(run, stats, waits)


def _write(run: Run, batch: Any, rollouts: Any, stats: Mapping[str, float], clock: list[float]) -> None:
    at, folder = run.at, run.folder
    folder.metrics({"step": at.step, "stage": run.leg.name, **stats})
    spans = [b - a for a, b in zip(clock, clock[1:], strict=False)]
    total = clock[-1] - clock[0]
    perf = {
        "step": at.step,
        "time/step_s": total,
        **dict(zip(("time/speak_s", "time/judge_s", "time/learn_s"), spans, strict=True)),
        "rate/tokens_per_s": sum(r.spoken for r in rollouts) / max(total, 1e-9),
        "memory/peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    folder.perf(perf)
    for row in record.samples(run.recipe, run.parts.teachers, run.leg, batch, at.step):
        folder.sample(row)
    run.watch("step", {"step": at.step, "stage": run.leg.name, **stats, **perf})


def _guard(run: Run, stats: Mapping[str, float], waits: bool) -> str | None:
    for message, remedy in run.watchdog.look(stats):
        run.folder.event(run.at.step, "warning", message, remedy)
        run.watch("warning", {"step": run.at.step, "message": message, "remedy": remedy})
    run.at.watchdog = asdict(run.watchdog)
    if waits:
        return None
    run.at.empty = run.at.empty + 1 if stats.get("grad/norm", 0.0) == 0.0 else 0
    limit = run.leg.stage.train.max_empty_steps
    if run.at.empty >= limit:
        dead = stats.get("group/degenerate_share")
        why = f"; {dead:.0%} of the groups had equal rewards" if dead else ""
        return (
            f"{limit} steps in a row had nothing to learn from{why}. Raise speak.temperature or the group, or choose "
            "prompts that the student sometimes gets right"
        )
    return None


# --- evaluation, checkpoints, the end --------------------------------------------------------------------------------


def _evaluate(run: Run) -> None:
    recipe, at = run.recipe, run.at
    if not run.parts.dev or at.evaluated == at.step:
        return
    leg = run.legs[min(at.leg, len(run.legs) - 1)]
    role = next((j.role for each in run.legs for j, s in each.method.needs.items() if s is Says.TEXT), None)
    numbers = evaluate(
        run.student.model,
        run.parts.teachers,
        run.parts.dev,
        leg.sampling,
        rewards=run.parts.rewards,
        critic=run.critic,
        text_role=role,
        greedy=recipe.eval.greedy,
        sampled=recipe.eval.sampled,
        samples=recipe.eval.samples,
        seed=recipe.run.seed,
        rows=recipe.speak.batch_rows,
    )
    at.evaluated = at.step
    at.before = at.before or numbers
    at.after = numbers
    run.folder.metrics({"step": at.step, "stage": leg.name, "event": "eval", **numbers})
    run.watch("eval", {"step": at.step, "stage": leg.name, **numbers})
    _keep_best(run, numbers)


def _keep_best(run: Run, numbers: Mapping[str, float]) -> None:
    recipe, at = run.recipe, run.at
    name = recipe.eval.metric if "/" in recipe.eval.metric else f"eval/{recipe.eval.metric}"
    value, band = numbers.get(name), recipe.eval.length_band
    if value is None:
        if at.step == 0 and recipe.eval.keep == "best" and recipe.eval.metric != "dev_score":
            known = ", ".join(sorted(numbers))
            raise OpdError(f"eval.metric `{recipe.eval.metric}` is not measured; there are {known}")
        return
    inside = band is None or band[0] <= numbers.get("eval/length_ratio", 1.0) <= band[1]
    gain = 0.0 if at.best_value is None else value - at.best_value
    if inside and (at.best_value is None or (gain < 0 if name in LOWER_IS_BETTER else gain > 0)):
        at.best_step, at.best_value = at.step, value
        if at.step:
            _save(run)
            run.folder.event(at.step, "best", f"{name} {value:.4f}, the best so far")


def _save(run: Run) -> None:
    at = run.at
    module = run.student.model.module
    tensors: dict[str, dict[str, torch.Tensor]] = {
        "student": dict(trained(module)),
        "student_optimizer": checkpoint.optimizer_tensors(run.student.optimizer, dict(trained(module))),
        "random": checkpoint.random_tensors(),
    }
    if run.critic is not None:
        with run.critic.entered():
            own = dict(trained(run.critic.learner))
            tensors["critic"] = {k: v.detach().clone() for k, v in own.items()}
            tensors["critic_optimizer"] = checkpoint.optimizer_tensors(run.critic.optimizer, own)
    reference = run.parts.teachers.reference
    if reference is not None:
        tensors["reference"] = _own_weights(reference)
    state = {"progress": asdict(at), "offsets": run.folder.offsets()}
    protect = {at.best_step} if at.best_step else set()
    checkpoint.save(run.folder.checkpoints, at.step, tensors, state, keep=run.recipe.run.keep, protect=protect)


def _own_weights(model: CausalModel) -> dict[str, torch.Tensor]:
    if model.adapter is None:
        return dict(model.module.named_parameters())
    return {k: v for k, v in model.module.named_parameters() if f".{model.adapter}." in k}


def _finish(run: Run, status: str, reason: str) -> tuple[str, str]:
    """End with the best weights if the recipe wants them, and write the student as a model folder."""
    at, recipe = run.at, run.recipe
    if reason:
        run.folder.event(at.step, "stop", reason)
    if recipe.eval.keep == "best" and at.best_step is not None and at.best_step != at.step:
        place = checkpoint.complete(run.folder.checkpoints).get(at.best_step)
        if place is not None:
            _load_into(run.student.model.module, checkpoint.load(place)[0]["student"])
            run.folder.event(at.step, "best", f"ends with the weights of step {at.best_step}, the best evaluated")
    record.write_model(run.folder.path / "model", run.student.model, run.parts.teachers.renderer)
    return status, reason


def _summary(run: Run, status: str, reason: str) -> dict[str, Any]:
    at = run.at
    return {
        "status": status,
        "reason": reason,
        "method": run.legs[-1].method.name,
        "step": at.step,
        "before": at.before,
        "after": at.after,
        "best": {"step": at.best_step, "value": at.best_value},
        "tokens": {"generated": at.generated, "trained": at.learned},
        "seconds": at.seconds,
        "flops": at.flops,
    }
