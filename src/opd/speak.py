"""Who speaks: prompts and a method in, rollouts out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from opd.engines.base import Sampling
from opd.errors import UsageError
from opd.method import Method
from opd.student import Student
from opd.teachers import Teachers, speak_with
from opd.types import Prompt, Rollout


def speak(
    prompts: Sequence[Prompt],
    method: Method,
    *,
    student: Student,
    teachers: Teachers,
    sampling: Sampling,
    seed: int,
    step: int,
    stage_step: int = 0,
    cursor: int,
    rows: int,
) -> list[Rollout]:
    """The rollouts of one step, rows of a prompt together. `cursor` is the running number of the first prompt.

    Noise is of the run's `step`, scheduled shares of the stage's.

    A prompt that stands twice in a step gets samples of other numbers, and so other noise, the second time.
    """
    speakers = [method.speaks.of(cursor + i, stage_step) for i in range(len(prompts))]
    out: list[list[Rollout]] = [[] for _ in prompts]
    for place, rollout in _students(prompts, speakers, method, student, teachers, sampling, seed, step, rows):
        out[place].append(rollout)
    for role in method.speaks.names:
        if role == "student":
            continue
        asked = [i for i, who in enumerate(speakers) if role in who]
        texts = given(role, [prompts[i] for i in asked], teachers, sampling)
        for i in asked:
            prompt = prompts[i]
            choice = texts[prompt.id]
            if not choice:
                raise UsageError(
                    f"{prompt.where or prompt.id}: `{role}` has no answer to this prompt, and is to speak to it"
                )
            out[i].append(choice[(cursor + i) % len(choice)])
    return [rollout for group in out for rollout in group]


def _students(
    prompts: Sequence[Prompt],
    speakers: Sequence[tuple[str, ...]],
    method: Method,
    student: Student,
    teachers: Teachers,
    sampling: Sampling,
    seed: int,
    step: int,
    rows: int,
) -> list[tuple[int, Rollout]]:
    asked = [i for i, who in enumerate(speakers) if "student" in who]
    if not asked:
        return []
    seen: dict[str, int] = {}
    turn = []
    for i in asked:
        turn.append(seen.get(prompts[i].id, 0))
        seen[prompts[i].id] = turn[-1] + 1
    repeats = max(turn) + 1
    renderer = teachers.renderer
    distinct = list({prompts[i].id: prompts[i] for i in asked}.values())
    samples, blend = method.group * repeats, teachers.blend(method.speaks.blend)
    spoken = speak_with(student.model, renderer, distinct, samples, sampling, seed, step, rows, blend)
    said = {p.id: each for p, each in zip(distinct, spoken, strict=True)}
    ids = {p.id: renderer.prompt_ids(p) for p in distinct}
    out = []
    for i, again in zip(asked, turn, strict=True):
        prompt = prompts[i]
        for k in range(again * method.group, (again + 1) * method.group):
            s = said[prompt.id][k]
            out.append(
                (i, renderer.spoken(prompt, ids[prompt.id], s.tokens, s.logp, s.finish, "student", k, student.version))
            )
    return out


def given(
    role: str, prompts: Sequence[Prompt], teachers: Teachers, sampling: Sampling
) -> Mapping[str, Sequence[Rollout]]:
    """All that a speaker other than the student may say to each prompt, by prompt id: it does not change."""
    if role == "data":
        return {p.id: _responses(p, teachers, sampling) for p in prompts}
    return teachers.texts(role, prompts)


def _responses(prompt: Prompt, teachers: Teachers, sampling: Sampling) -> list[Rollout]:
    given = teachers.renderer.given
    return [
        given(prompt, text, "data", sample=k, max_tokens=sampling.max_tokens) for k, text in enumerate(prompt.responses)
    ]
