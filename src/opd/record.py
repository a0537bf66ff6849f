"""What a run writes down: documents at its start, numbers and samples of each step, the model at its end."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from opd import math, recipe
from opd.assemble import Parts, model_path
from opd.batch import Batch
from opd.chat import Renderer
from opd.credits import Reward
from opd.critic import Critics
from opd.legs import Leg
from opd.lock import lock
from opd.log import RunFolder, full_disk, json_line
from opd.method import CRITIC, EXPERT, Method
from opd.metrics import length_only_accuracy
from opd.model import CausalModel, adapter, parameters
from opd.signals import Distribution, Score, Token, TopK
from opd.teachers import Teachers
from opd.types import Judge, Rollout


def locked(chosen: recipe.Recipe, parts: Parts, base: Path, device: str, origin: Path | None) -> dict[str, Any]:
    """lock.json: what the run depends on. `origin` is the checkpoint that its student began with."""
    named = {"student": chosen.student.model} | {r: t.model for r, t in chosen.teachers.items() if t.model}
    places = {role: Path(model_path(model)) for role, model in named.items()}
    known = lock(
        seed=chosen.run.seed,
        threads=torch.get_num_threads(),
        device=device,
        models={role: place for role, place in places.items() if place.is_dir()},
    )
    begun = None if origin is None else str(origin.absolute())
    licences = {role: teacher.licence for role, teacher in chosen.teachers.items() if teacher.licence}
    own = {"hashes": dict(parts.hashes), "licences": licences, "base": str(base.absolute()), "origin": begun}
    return {**known, **own}


def begin(
    folder: RunFolder,
    chosen: recipe.Recipe,
    origins: Mapping[str, str],
    planned: Mapping[str, Any],
    notes: Sequence[str],
    known: Mapping[str, Any],
) -> None:
    """lock.json, plan.json, origins.json and, last, recipe.yaml, before the first step: with it a run can resume."""
    folder.write_json("lock.json", known)
    folder.write_json("plan.json", {**planned, "reads": list(notes)})
    folder.write_json("origins.json", dict(origins))
    for note in notes:
        folder.event(0, "note", note)
    folder.write_text("recipe.yaml", recipe.dump(chosen))


def describe(batch: Batch, method: Method, spoken: Sequence[Rollout]) -> dict[str, float]:
    """Numbers of a step's rollouts: rewards, scores, groups, lengths, tokens.

    `spoken` are all of them; the batch lacks those that no reward could judge.
    """
    students = [r for r in batch.rollouts if r.speaker == "student"]
    given = [r for r in batch.rollouts if r.speaker not in ("student", "reference")]
    snapshot = [r for r in batch.rollouts if r.speaker == "reference"]
    out = {
        "tokens/generated": float(sum(r.spoken for r in spoken if r.speaker == "student")),
        "tokens/trained": float(sum(r.spoken for r in _counted(batch, method))),
    }
    if students:
        out["length/student_tokens"] = sum(r.spoken for r in students) / len(students)
        out["length/truncated_share"] = sum(r.finish == "length" for r in students) / len(students)
    if given:
        out["length/teacher_tokens"] = sum(r.spoken for r in given) / len(given)
    if snapshot:
        out["length/reference_tokens"] = sum(r.spoken for r in snapshot) / len(snapshot)
    if "reward" in method.loss.reads:
        out |= {"reward/missing_share": 1 - len(batch.rollouts) / max(1, len(spoken))}
        out |= _spread("reward", batch.reward_B, batch, _min_std(method))
        for name in sorted({n for r in students for n in r.rewards}):
            given_it = [r.rewards[name] for r in students if name in r.rewards]
            out[f"reward/{name}"] = sum(given_it) / len(given_it)
    for judge, said in batch.signals.items():
        if not isinstance(said, Score) and judge.view != "same":
            out[f"view/{judge.view}_missing_share"] = 1 - float(batch.heard(judge).mean())
    signal = batch.signals.get(CRITIC)
    if isinstance(signal, Score):
        out |= _spread("score", signal.value_B, batch, _min_std(method))
        if len(signal.value_KB) > 1 and students:
            own = torch.tensor([r.speaker == "student" for r in batch.rollouts], device=batch.group_B.device)
            apart = math.credit.disagreement(signal.value_KB[:, own].double(), batch.group_B[own])
            out["critic/disagreement"] = float(apart)
    return out


def critic_view(rollouts: Sequence[Rollout], teachers: Teachers, good: str) -> dict[str, float]:
    """Lengths of student against teacher text, and how far length alone tells them apart."""
    students = [r for r in rollouts if r.speaker == "student"]
    texts = teachers.texts(good, (r.prompt for r in students))
    pairs = [(texts[r.prompt.id][0].spoken, r.spoken) for r in students if texts[r.prompt.id]]
    if len(pairs) < 2:
        return {}
    teacher, student = (sum(x) / len(pairs) for x in zip(*pairs, strict=True))
    return {
        "length/teacher_tokens": teacher,
        "length/ratio": student / max(teacher, 1e-9),
        "critic/length_only_accuracy": length_only_accuracy([t for t, _ in pairs], [s for _, s in pairs]),
    }


def _min_std(method: Method) -> float:
    """The deviation at which a group still gets no credit, by the method's own loss."""
    found = [e for t in method.loss.terms for outer in t.expressions for e in outer.every()]
    return max((e.min_std for e in found if isinstance(e, Reward)), default=0.0)


def _spread(name: str, value_B: torch.Tensor, batch: Batch, min_std: float) -> dict[str, float]:
    own = torch.tensor([r.speaker == "student" for r in batch.rollouts], dtype=torch.bool, device=value_B.device)
    values, groups = value_B[own].double(), batch.group_B[own]
    if not len(values):
        return {}
    dead = math.credit.degenerate_groups(values, groups, min_std)
    out = {f"{name}/mean": float(values.mean()), f"{name}/std": float(values.std(unbiased=False))}
    return {**out, "group/degenerate_share": float(dead.double().mean())}


def _counted(batch: Batch, method: Method) -> list[Rollout]:
    sources = {t.source for t in method.loss.token_terms}
    return [r for r in batch.rollouts if None in sources or r.speaker in sources]


def samples(chosen: recipe.Recipe, teachers: Teachers, leg: Leg, batch: Batch, step: int) -> Iterator[dict[str, Any]]:
    """Lines of samples.jsonl: the first rows of the step, with the teacher's text, scores and per-token log-ratios."""
    rows = [i for i, r in enumerate(batch.rollouts) if r.speaker == "student"] or list(range(len(batch.rollouts)))
    firsts = {batch.rollouts[i].prompt.id: i for i in reversed(rows)}  # one of each prompt says more than one's group
    rows = sorted(firsts.values())[: chosen.run.sample_rows]
    if not rows:
        return
    part = batch.rows(rows)
    role = leg.method.taught_by
    texts = teachers.texts(role, (r.prompt for r in part.rollouts)) if role else {}
    score = part.signals.get(CRITIC)
    judge = next(
        (j for j, s in part.signals.items() if isinstance(s, Token | TopK | Distribution) and j.role != "reference"),
        None,
    )
    gap_N = part.behaviour_N - part.judged(judge) if judge else None
    teacher_score: dict[str, float] = {}
    if isinstance(score, Score) and teachers.critic is not None:
        shown = {i: t[0] for i, t in texts.items() if t}
        values = teachers.critic.score([teachers.renderer.canonical(t).tokens for t in shown.values()]).tolist()
        teacher_score = dict(zip(shown, values, strict=True))
    for i, rollout in enumerate(part.rollouts):
        spoken = [t for t, m in zip(rollout.tokens, rollout.mask, strict=True) if m]
        said = texts.get(rollout.prompt.id, ())
        yield {
            "step": step,
            "stage": leg.name,
            "prompt_id": rollout.prompt.id,
            "prompt": rollout.prompt.text,
            "domain": rollout.prompt.domain,
            "sample": rollout.sample,
            "speaker": rollout.speaker,
            "text": rollout.text,
            "finish": rollout.finish,
            "tokens": len(spoken),
            "reward": rollout.reward,
            "score": float(score.value_B[i]) if isinstance(score, Score) else None,
            "teacher_text": said[0].text if said else None,
            "teacher_score": teacher_score.get(rollout.prompt.id),
            "kl_per_token": _numbers(gap_N[part.row_N == i]) if gap_N is not None else None,
            "pieces": list(teachers.renderer.pieces(spoken)) if gap_N is not None else None,
        }


def _numbers(x_n: torch.Tensor) -> list[float | None]:
    return [None if v != v else round(v, 4) for v in x_n.tolist()]


def flops(
    student: CausalModel, critic: Critics | None, teachers: Teachers, method: Method, batch: Batch, *, learning: bool
) -> float:
    """Floating-point operations of a step by the usual count: 2 a parameter and token forward, 6 to learn.

    Embedding look-ups are free; the output head counts. Attention's own products are left out.
    """
    students = [r for r in batch.rollouts if r.speaker == "student"]
    own = parameters(student)
    total = 2 * own * _length(students)
    if learning:
        total += 6 * own * _length(_counted(batch, method))
    for judge, says in method.needs.items():
        if says.by_token:
            total += 2 * _asked(teachers, judge, batch)
    if method.speaks.blend is not None:  # the other half of a blend decodes along
        total += 2 * teachers.size(method.speaks.blend[0]) * _length(students)
    if critic is not None and method.loss.learned:
        per_token = 2 if all(learned.fixed for learned in method.loss.learned) else 2 + 6
        total += per_token * sum(map(parameters, critic.models)) * _length(students) * (1 + 1 / max(1, method.group))
    return total


def _asked(teachers: Teachers, judge: Judge, batch: Batch) -> float:
    """Parameters times tokens of a judge's forward passes: each row that it heard by the model that it is for."""
    heard = set(batch.row_N[batch.heard(judge) > 0].tolist())
    rows = [batch.rollouts[b] for b in sorted(heard)]
    whose = [r.prompt.domain if judge.role == EXPERT else judge.role for r in rows]
    return float(sum(teachers.size(w) * len(r.tokens) for w, r in zip(whose, rows, strict=True)))


def _length(rows: Sequence[Rollout]) -> float:
    return float(sum(len(r.tokens) for r in rows))


def keep_rollouts(folder: RunFolder, step: int, rollouts: Sequence[Rollout]) -> Path:
    """The rollouts of a step that went wrong, for a person to look at."""
    path = folder.path / "debug" / f"step-{step:06d}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"".join(json_line(_plain(rollout)) for rollout in rollouts))
    return path


def _plain(rollout: Rollout) -> dict[str, Any]:
    held = ("speaker", "sample", "text", "finish", "tokens", "mask", "behaviour", "version", "rewards", "reward")
    prompt = {"prompt_id": rollout.prompt.id, "prompt": rollout.prompt.text, "where": rollout.prompt.where}
    return prompt | {name: getattr(rollout, name) for name in held}


def write_model(folder: RunFolder, model: CausalModel, renderer: Renderer) -> None:
    """The student as a folder `model` that `from_pretrained` loads: merged when it was trained by LoRA.

    The weights are float32 whatever the student computed in: a merge in bfloat16 would round small updates away. The
    folder is built beside its place and renamed, so it is whole or absent. Raises `OpdError` when the disk is full.
    """
    module: Any = model.module
    if model.adapter is not None:
        with adapter(module, model.adapter):
            module = copy.deepcopy(module).float().merge_and_unload(adapter_names=[model.adapter])
    place, half = folder.path / "model", folder.path / ".model.tmp"
    with full_disk(f"{place} could not be written", "The checkpoints are kept", folder.path):
        try:
            shutil.rmtree(half, ignore_errors=True)
            module.save_pretrained(half, safe_serialization=True)
            renderer.tokenizer.save_pretrained(half)
            shutil.rmtree(place, ignore_errors=True)
            half.rename(place)
        finally:
            shutil.rmtree(half, ignore_errors=True)
