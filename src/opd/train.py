"""The loop: stages of steps, evaluations, checkpoints. One step is a straight line; everything else is around it."""

from __future__ import annotations

import math
import resource
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from opd import best, record, snapshot, state, texts
from opd import rewards as scoring
from opd.assemble import assemble, device_of, optim
from opd.batch import Batch, pack
from opd.diagnose import Watchdog, paced, smoothed
from opd.errors import OpdError
from opd.eval import evaluate
from opd.interrupt import Interrupt
from opd.legs import Leg, first_cursor, legs, plan, text_role
from opd.log import RunFolder
from opd.recipe import Recipe
from opd.replay import Replay
from opd.speak import speak
from opd.state import Progress, Run, Watch
from opd.student import NotFiniteError, Student
from opd.types import Rollout

__all__ = ["Watch", "learning_rate", "train"]


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
    run = _open(recipe, folder, base, origins or {}, resume, origin, watch or _nobody)
    interrupt = interrupt or Interrupt()
    status, reason = "failed", ""
    try:
        with interrupt:
            folder.write_json("summary.json", run.summary("running"))
            status, reason = _stages(run, interrupt)
    except BaseException as error:
        now = isinstance(error, KeyboardInterrupt)
        status = "stopped" if now else "failed"
        reason = "interrupted twice, and stopped at once" if now else str(error) or type(error).__name__
        with suppress(OpdError, OSError):
            folder.event(run.at.step, "stop", reason)
        raise
    finally:
        summary = run.summary(status, reason)
        with suppress(OpdError, OSError):
            folder.write_json("summary.json", summary)
    return summary


def _nobody(_kind: str, _numbers: Mapping[str, Any]) -> None: ...


def _open(
    recipe: Recipe,
    folder: RunFolder,
    base: Path,
    origins: Mapping[str, str],
    resume: bool,
    origin: Path | None,
    watch: Watch,
) -> Run:
    found = legs(recipe, base)
    device = device_of(recipe)
    parts = assemble(recipe, found, base, device, folder.path)
    parts.teachers.write_down = folder.answer
    student = Student(parts.student, optim(found[0].stage.train))
    run = Run(recipe, found, parts, folder, student, None, Progress(), watch, Watchdog(), Replay(recipe.critic.replay))
    known = record.locked(recipe, parts, base, device, origin)
    if resume:
        state.restore(run, known)
    else:
        if origin is not None:
            state.begin_from(run, origin)
        record.begin(folder, recipe, origins, plan(recipe, found), parts.notes, known)
    return run


# --- stages ----------------------------------------------------------------------------------------------------------


def _stages(run: Run, interrupt: Interrupt) -> tuple[str, str]:
    """Every stage to its end; returns the status and, when stopped early, why.

    A turn of the loop does what is due after a step and then makes the next, so that a run that was stopped anywhere
    in it finds its place by what its checkpoint says.
    """
    at, every = run.at, run.recipe.run.save_every
    stop: str | None = None
    saved = at.step
    while at.leg < len(run.legs):
        if interrupt.asked:
            state.save(run)
            run.folder.event(at.step, "stop", "interrupted; the step was finished and saved")
            return "stopped", "interrupted"
        steps = run.leg.steps(run.mixture.size)
        ended = at.leg_step >= steps
        better = _evaluate(run) if ended or stop or _due(run) else False
        if at.evaluated == at.step and not ended:
            stop = stop or best.collapsed(run)
        if ended:
            _keep_student(run, run.leg.name)
            at.leg, at.leg_step = at.leg + 1, 0
            if at.leg < len(run.legs):
                at.cursor = first_cursor(run.legs, at.leg, run.parts.mixture)
        if ended or better or stop or (every and at.step % every == 0 and at.step > saved):
            state.save(run)
            saved = at.step
        if stop:
            return _finish(run, "stopped", stop)
        if ended or interrupt.asked:
            continue
        if at.leg_step == 0:
            _begin_stage(run, steps)
        started = time.perf_counter()
        stop = _one(run, steps)
        at.seconds += time.perf_counter() - started
    return _finish(run, "finished", "")


def _due(run: Run) -> bool:
    own, step = run.recipe.eval, run.at.step
    return own.at_start if step == 0 else bool(own.every) and step % own.every == 0


def _keep_student(run: Run, stage: str) -> None:
    """Write the student down at the end of a stage (or as `initial`), if a stage or a teacher will be made of it."""
    named = {leg.stage.start for leg in run.legs} | {t.stage for t in run.recipe.teachers.values()}
    if stage in named:
        snapshot.keep(run.student.model, snapshot.place(run.folder.path, stage))


def _begin_stage(run: Run, steps: int) -> None:
    leg, teachers = run.leg, run.parts.teachers
    if run.at.leg == 0:
        _keep_student(run, snapshot.INITIAL)
    if leg.stage.start != "previous":
        snapshot.return_to(run.student.model, snapshot.place(run.folder.path, leg.stage.start))
        run.at.height, run.watchdog = None, Watchdog()  # what the student was in between is no measure of it now
    run.student.fresh_optimizer(optim(leg.stage.train))
    teachers.stage = leg.name
    if any(j.role == "reference" for j in leg.method.needs):
        teachers.reference = run.student.model.frozen_copy("reference")
    if leg.method.ema is not None:
        teachers.ema = run.student.model.frozen_copy("ema")
    if leg.method.loss.learned and run.critic is None:
        run.critic = teachers.critic = state.new_critic(run)
    words = f"stage `{leg.name}`: {leg.method.loss}, {steps} steps"
    run.folder.event(run.at.step, "stage", words)
    run.watch("stage", {"name": leg.name, "steps": steps, "equation": str(leg.method.loss)})


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
    at, leg, teachers = run.at, run.leg, run.parts.teachers
    clock = [time.perf_counter()]
    behind, ahead = paced(at.critic_accuracy, run.recipe.critic.accuracy_band if leg.learns else None)
    waits = behind or at.leg_step < leg.stage.critic.alone_steps
    spoken: list[Rollout] = []
    try:
        spoken = _speak(run)
        rollouts = spoken
        if "reward" in leg.method.loss.reads:
            rollouts = [r for r in scoring.score(run.parts.rewards, spoken) if r.reward is not None]
        if leg.looks_back:
            rollouts = teachers.look_back(rollouts, at.step)
        clock.append(time.perf_counter())
        model = run.student.model
        dtype = torch.float64 if model.compute == torch.float64 else torch.float32
        batch = pack(rollouts, temperature=leg.sampling.temperature, device=model.device, dtype=dtype)
        batch = teachers.hear(batch, leg.method.needs, leg.method.loss.depths)
        clock.append(time.perf_counter())
        stats = {} if waits else _learn(run, batch, learning_rate(leg, at.leg_step, steps))
        stats |= _teach_critic(run, rollouts, behind=behind, ahead=ahead)
        clock.append(time.perf_counter())
    except (OpdError, torch.OutOfMemoryError) as error:
        raise _located(run, error, spoken) from error
    at.step, at.leg_step, at.cursor = at.step + 1, at.leg_step + 1, at.cursor + leg.stage.train.prompts
    at.version = run.student.version
    at.critic_steps = run.critic.steps if run.critic else 0
    stats |= record.describe(batch, leg.method, spoken)
    shown = {judge.view for judge in leg.method.needs} & teachers.views.keys()
    stats |= texts.described(rollouts, [teachers.views[name] for name in sorted(shown)])
    at.generated += int(stats["tokens/generated"])
    if not waits:
        at.learned += int(stats["tokens/trained"])
        at.empty = at.empty + 1 if stats.get("grad/norm", 0.0) == 0.0 else 0
        stats["grad/empty_steps"] = float(at.empty)
    at.flops += record.flops(model, run.critic, teachers, leg.method, batch, learning=not waits)
    _write(run, batch, stats, clock)
    _warn(run, stats)
    alarm = run.recipe.eval.collapse is not None
    return None if waits else _nothing_learned(run, stats) or (run.watchdog.collapsed() if alarm else None)


def _speak(run: Run) -> list[Rollout]:
    at, leg = run.at, run.leg
    return speak(
        run.mixture.prompts(at.cursor, leg.stage.train.prompts),
        leg.method,
        student=run.student,
        teachers=run.parts.teachers,
        sampling=leg.sampling,
        seed=run.recipe.run.seed,
        step=at.step,
        stage_step=at.leg_step,
        cursor=at.cursor,
        rows=run.recipe.speak.batch_rows,
    )


def _learn(run: Run, batch: Batch, lr: float) -> dict[str, float]:
    stats = run.student.update(batch, run.leg.method.loss, run.at.leg_step, lr)
    if (mean := run.parts.teachers.ema) is not None and run.leg.method.ema is not None:
        snapshot.move_mean(mean, run.student.model, run.leg.method.ema)
    return {**stats, "lr/student": lr}


def _teach_critic(run: Run, rollouts: Sequence[Rollout], *, behind: bool, ahead: bool) -> dict[str, float]:
    stats: dict[str, float] = {}
    for learned in run.leg.method.loss.learned:
        assert run.critic is not None
        lr, good, seed = run.critic.optim.lr, learned.objective.good, run.recipe.run.seed
        pairs = run.parts.teachers.pairs(rollouts, good)
        if learned.fixed or ahead:
            stats |= run.critic.ranks(run.critic.score(pairs.rows), pairs) if pairs.count else {}
        else:
            earlier = run.replay.draw(pairs.count, seed, run.at.step)
            stats |= {**run.critic.update(pairs, learned.objective, lr, earlier=earlier), "lr/critic": lr}
            for _ in range(run.recipe.critic.steps - 1):
                run.critic.update(pairs, learned.objective, lr, earlier=earlier)
        run.replay = run.replay.after(run.at.step, pairs)
        stats |= record.critic_view(rollouts, run.parts.teachers, good)
        if run.recipe.critic.accuracy_band is not None and "critic/accuracy" in stats:
            run.at.critic_accuracy = smoothed(run.at.critic_accuracy, stats["critic/accuracy"])
            stats |= {"critic/rests": float(ahead), "critic/student_waits": float(behind)}
    return stats


def _located(run: Run, error: Exception, spoken: Sequence[Rollout]) -> OpdError:
    """The error of a step with its place, and with what was said in the step kept for a person to look at."""
    said = f"step {run.at.step + 1}, stage `{run.leg.name}`: "
    if isinstance(error, OpdError):
        said += str(error)
    else:
        said += f"the device is out of memory ({error}). Lower train.tokens_per_micro, train.tile or speak.batch_rows"
    if spoken:
        with suppress(OSError):
            said += f". What was said in this step is in {record.keep_rollouts(run.folder, run.at.step + 1, spoken)}"
    if isinstance(error, NotFiniteError):
        said += (
            ". A resume would meet it again: begin a new run from an earlier checkpoint with --fork RUN@STEP, and with "
            "a lower train.lr, a tighter train.clip or a method or teacher that gives finite numbers"
        )
    return type(error)(said) if isinstance(error, OpdError) else OpdError(said)


def _write(run: Run, batch: Batch, stats: Mapping[str, float], clock: list[float]) -> None:
    at, folder = run.at, run.folder
    folder.metrics({"step": at.step, "stage": run.leg.name, **stats})
    spans = [b - a for a, b in pairwise(clock)]
    total = clock[-1] - clock[0]
    perf = {
        "step": at.step,
        "time/step_s": total,
        **dict(zip(("time/speak_s", "time/judge_s", "time/learn_s"), spans, strict=True)),
        "rate/tokens_per_s": sum(r.spoken for r in batch.rollouts) / max(total, 1e-9),
        "memory/peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }
    folder.perf(perf)
    for row in record.samples(run.recipe, run.parts.teachers, run.leg, batch, at.step):
        folder.sample(row)
    run.watch("step", {"step": at.step, "stage": run.leg.name, **stats, **perf})


def _warn(run: Run, stats: Mapping[str, float]) -> None:
    for message, remedy in run.watchdog.look(stats):
        run.folder.event(run.at.step, "warning", message, remedy)
        run.watch("warning", {"step": run.at.step, "message": message, "remedy": remedy})
    run.at.watchdog = asdict(run.watchdog)


def _nothing_learned(run: Run, stats: Mapping[str, float]) -> str | None:
    if run.at.empty < run.leg.stage.train.max_empty_steps:
        return None
    dead = stats.get("group/degenerate_share")
    why = f"; {dead:.0%} of the groups had equal rewards" if dead else ""
    return (
        f"{run.at.empty} steps in a row had nothing to learn from{why}. Raise speak.temperature or the group, or "
        "choose prompts that the student sometimes gets right"
    )


# --- evaluation, the end ---------------------------------------------------------------------------------------------


def _evaluate(run: Run) -> bool:
    """Measure the student on data.dev, once a step; whether it is the best so far.

    Every evaluation samples as the last stage does, so that those of different stages can be compared.
    """
    recipe, at = run.recipe, run.at
    if not run.parts.dev or at.evaluated == at.step:
        return False
    try:
        numbers = evaluate(
            run.student.model,
            run.parts.teachers,
            run.parts.dev,
            run.legs[-1].sampling,
            rewards=run.parts.rewards,
            critic=run.critic,
            text_role=text_role(recipe, run.legs),
            greedy=recipe.eval.greedy,
            sampled=recipe.eval.sampled,
            samples=recipe.eval.samples,
            seed=recipe.run.seed,
            rows=recipe.speak.batch_rows,
        )
    except OpdError as error:
        raise type(error)(f"evaluation at step {at.step}: {error}") from error
    at.evaluated, at.after = at.step, numbers
    if at.step == 0:
        at.before = numbers
    run.folder.metrics({"step": at.step, "stage": run.leg.name, "event": "eval", **numbers})
    run.watch("eval", {"step": at.step, "stage": run.leg.name, **numbers})
    return best.is_best(run, numbers)


def _finish(run: Run, status: str, reason: str) -> tuple[str, str]:
    """End with the best weights if the recipe wants them, and write the student as a model folder."""
    at, recipe = run.at, run.recipe
    if reason:
        run.folder.event(at.step, "stop", reason)
    if recipe.eval.keep == "best" and run.parts.dev:
        best.take(run)
    record.write_model(run.folder, run.student.model, run.parts.teachers.renderer)
    return status, reason
