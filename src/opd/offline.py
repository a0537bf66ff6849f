"""Recording signals: who speaks texts that do not change speaks them, and a judge says once what it says of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from opd.assemble import Parts, assemble, device_of, mixture_prompts, model_fingerprint
from opd.batch import Batch, pack
from opd.cache import GIVES, Cache, Dtype, Index, Keep
from opd.errors import UsageError
from opd.legs import Leg, legs
from opd.log import RunFolder, said_before
from opd.recipe import Recipe
from opd.signals import Dense
from opd.speak import given
from opd.types import RETOKENIZED, Judge, Prompt, Rollout, Says

SHARD = 32768  # loss tokens of a shard, and of what is heard in one go
PROMPTS = 256  # whose texts are sampled before what they are judged to be is written
KEPT: dict[Says, Keep] = {says: keep for keep, says in GIVES.items()}

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Wish:
    """What is to be recorded: by whom, of what kind. Derived from the recipe's own loss unless it is named."""

    role: str
    keep: Keep
    k: int
    top_temperature: float
    temperature: float | None
    stages: tuple[Leg, ...]  # that ask the role


def asked(leg: Leg, role: str) -> dict[Judge, Says]:
    """The role under every view that a stage asks it under, and what for."""
    return {judge: says for judge, says in leg.method.needs.items() if judge.role == role and says.by_token}


def wished(recipe: Recipe, found: Sequence[Leg], role: str, keep: Keep | None = None, k: int | None = None) -> Wish:
    """What the recipe needs of a role once and for all. Raises `UsageError` where it cannot be recorded."""
    if role not in recipe.teachers or not recipe.teachers[role].model:
        have = ", ".join(r for r, t in recipe.teachers.items() if t.model) or "none"
        raise UsageError(
            f"`{role}` is no teacher with a `model:` in this recipe, and a model must speak: there: {have}"
        )
    stages = tuple(leg for leg in found if asked(leg, role))
    if not stages:
        raise UsageError(f"no stage of this recipe asks `{role}` for probabilities: there is nothing to record")
    problems = list(_changing(found, stages, role))
    needed = max(says for leg in stages for says in asked(leg, role).values())
    if needed > Says.DENSE:
        problems.append(f"`{role}` is asked for the states of its layers, which are not recorded: keep it as `model:`")
    least: Keep = KEPT.get(needed, "hidden")
    chosen: Keep = keep or least
    if GIVES[chosen] < needed:
        problems.append(
            f"--keep {chosen} is less than this recipe's loss reads of `{role}`: leave it out, or take {least}"
        )
    tops = {top for leg in stages for judge in asked(leg, role) for top in leg.method.loss.tops(judge)}
    most, heats = max((n for n, _ in tops), default=64), {temperature for _, temperature in tops} or {1.0}
    spoken = {leg.sampling.temperature for leg in stages}
    if chosen == "top_k" and len(heats) > 1:
        problems.append(f"the likeliest tokens of `{role}` are compared at several temperatures: take --keep hidden")
    if chosen == "top_k" and tops and k is not None and k < most:
        problems.append(f"--k {k} is less than the {most} tokens that this recipe's loss compares: raise it")
    if chosen != "hidden" and len(spoken) > 1:
        problems.append("stages speak at several temperatures, and a log-probability is of one: take --keep hidden")
    if problems:
        raise UsageError(*problems)
    if chosen == "hidden":
        return Wish(role, chosen, 0, 1.0, None, stages)
    return Wish(role, chosen, (k or most) if chosen == "top_k" else 0, heats.pop(), spoken.pop(), stages)


def _changing(found: Sequence[Leg], stages: Sequence[Leg], role: str) -> Iterator[str]:
    """Stages whose texts are not there yet."""
    for leg in stages:
        if any(judge.view == RETOKENIZED for judge in asked(leg, role)):
            yield f"stage `{leg.name}` lets `{role}` read its own tokens, and the student's are recorded"
        if leg.method.on_policy:
            yield (
                f"stage `{leg.name}` asks `{role}` of what the student says anew in every step, which cannot be "
                "recorded: record for a method whose speakers are data, a teacher or the reference"
            )
        if "reference" in leg.method.speaks.names and leg is not found[0]:
            yield (
                f"stage `{leg.name}` lets its reference speak, the student at the end of the stage before, which is "
                "not there yet: record for a recipe that begins with that student"
            )


def record(
    recipe: Recipe,
    base: Path,
    out: Path,
    role: str,
    *,
    keep: Keep | None = None,
    k: int | None = None,
    dtype: Dtype | None = None,
    progress: Progress = lambda *_: None,
) -> dict[str, Any]:
    """Write what `role` says of every fixed text of a recipe into `out`, or what of it is missing there; say how much.

    `dtype` is what hidden states are stored in, unless as they are. `progress` is told of prompts done, and of how
    many. Raises `UsageError` where the recipe's texts change, or `out` holds others.
    """
    found = legs(recipe, base)
    wish = wished(recipe, found, role, keep, k)
    if dtype is not None and wish.keep != "hidden":
        raise UsageError(f"--dtype is of hidden states, and {wish.keep} is kept: leave it out")
    if recipe.run.threads:
        torch.set_num_threads(recipe.run.threads)
    parts = assemble(recipe, found, base, device_of(recipe))
    teachers = parts.teachers
    teachers.reference = parts.student
    index = _index(recipe, parts, wish, dtype)
    out.mkdir(parents=True, exist_ok=True)
    with RunFolder(out) as folder:
        folder.hold()
        cache = Cache.begin(out, index, teachers.model(role).head if wish.keep == "hidden" else None)
        teachers.heard.update(said_before(out))
        teachers.write_down = folder.answer
        prompts = list({p.id: p for p in mixture_prompts(parts.mixture)}.values())
        for leg in wish.stages:
            teachers.stage = leg.name
            for start in range(0, len(prompts), PROMPTS):
                progress(start, len(prompts))
                rows = texts(leg, prompts[start : start + PROMPTS], parts)
                for judge in asked(leg, role):
                    _record_rows(cache, judge, wish, rows, parts, leg)
        progress(len(prompts), len(prompts))
    return sizes(cache)


def texts(leg: Leg, prompts: Sequence[Prompt], parts: Parts) -> list[Rollout]:
    """All that the speakers of a stage may say to these prompts."""
    said = [given(role, prompts, parts.teachers, leg.sampling) for role in leg.method.speaks.names]
    return [rollout for prompt in prompts for by_prompt in said for rollout in by_prompt[prompt.id]]


def sizes(cache: Cache) -> dict[str, Any]:
    """How much a folder holds, and what the whole distributions in float32 would have taken."""
    return {
        "folder": str(cache.folder),
        "keep": cache.index.keep,
        "rows": cache.rows,
        "tokens": cache.tokens,
        "bytes": cache.bytes,
        "bytes_per_token": cache.index.bytes_per_token,
        "bytes_per_token_whole": 4 * cache.index.vocab,
    }


def _index(recipe: Recipe, parts: Parts, wish: Wish, dtype: Dtype | None) -> Index:
    teacher, model = recipe.teachers[wish.role], parts.teachers.model(wish.role)
    own: Dtype = next(d for d in get_args(Dtype) if str(model.hidden_dtype) == f"torch.{d}")
    spoke = any("reference" in leg.method.speaks.names for leg in wish.stages)
    return Index(
        role=wish.role,
        model=teacher.model or "",
        teacher=model_fingerprint(teacher, model),
        tokenizer=parts.teachers.renderer.fingerprint,
        student=model_fingerprint(recipe.student, parts.student) if spoke else "",
        keep=wish.keep,
        dtype=(dtype or own) if wish.keep == "hidden" or own == "float64" else "float32",
        temperature=wish.temperature,
        k=wish.k,
        top_temperature=wish.top_temperature,
        vocab=model.head.vocab,
        width=model.head.weight.shape[1],
        scale=model.head.scale,
        softcap=model.head.softcap,
    )


def _record_rows(cache: Cache, judge: Judge, wish: Wish, rows: Sequence[Rollout], parts: Parts, leg: Leg) -> None:
    """Hear a judge about the rows that the folder lacks, a shard at a time."""
    teachers, student = parts.teachers, parts.student
    exact = torch.float64 if student.compute == torch.float64 else torch.float32
    for chunk in _chunks(rows):
        batch = pack(chunk, temperature=leg.sampling.temperature, device=student.device, dtype=exact)
        seen, shown_B = teachers.seen(batch, judge)
        keys = [cache.key(r, judge.view) for r in seen.rollouts]
        first = {row: b for b, row in reversed(list(enumerate(keys)))}  # the same text twice is recorded once
        new = sorted(b for row, b in first.items() if shown_B[b] and seen.length_B[b] and row not in cache)
        if new:
            part = batch.rows(new)
            cache.add(seen.rows(new), judge.view, extract(teachers.hear_one(judge, part, GIVES[wish.keep]), part, wish))


def extract(signal: Any, batch: Batch, wish: Wish) -> dict[str, Tensor]:
    """What of a signal is kept, by the names of `cache.TENSORS`."""
    if wish.keep == "token":
        return {"logp": signal.logp_N}
    assert isinstance(signal, Dense)
    if wish.keep == "hidden":
        return {"hidden": signal.hidden_NH}
    ids_NK, top_NK = signal.top(wish.k, wish.top_temperature)
    return {"logp": signal.logp(batch.token_N, batch.temperature), "ids": ids_NK.int(), "top": top_NK}


def _chunks(rows: Sequence[Rollout]) -> Iterator[list[Rollout]]:
    chunk: list[Rollout] = []
    for row in rows:
        if chunk and sum(r.spoken for r in chunk) + row.spoken > SHARD:
            yield chunk
            chunk = []
        chunk.append(row)
    if chunk:
        yield chunk
