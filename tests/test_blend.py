"""Speaking with two models at once: the token is drawn from their mixture, and recorded with its probability."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from test_local_engine import IDS, PROMPTS, flat, forced, speak, tiny

from opd import world
from opd.chat import renderer
from opd.engines import local
from opd.engines.base import Sampling
from opd.engines.blend import Blend
from opd.engines.noise import key, uniform
from opd.errors import UsageError
from opd.eval import answer
from opd.method import Method, Setting, bind, both, build, one
from opd.model import load
from opd.schedule import linear
from opd.speak import speak as speak_to
from opd.student import Optim, Student
from opd.teachers import Teachers
from opd.types import Says

SHARE, TAU = 0.3, 0.7


def other(kind: str, share: float = SHARE) -> Blend:
    """Another model of this kind, and not the one that `tiny` makes."""
    model = tiny(kind)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.3)
    return Blend(model, share, nullcontext)


PAIRS = [("llama", "qwen3"), ("llama", "gpt2"), ("gpt2", "llama"), ("gpt2", "mistral-window"), ("lfm2", "llama")]


@pytest.mark.parametrize(("own", "two"), PAIRS)
def test_tokens_and_probabilities_are_those_of_the_mixture(own: str, two: str) -> None:
    """From whole forwards of both: fused and plain loops, rows that come and go, rows that stay to the end."""
    model, blend = tiny(own), other(two)
    said = speak(model, rows=4, sampling=Sampling(max_tokens=12, temperature=TAU), blend=blend)
    assert len(set(flat(said))) > 10 and {s.finish for group in said for s in group} == {"stop", "length"}
    for prompt, name, group in zip(PROMPTS, IDS, said, strict=True):
        for sample, spoken in enumerate(group):
            each = [(forced(m, prompt, spoken.tokens) / TAU).softmax(-1) for m in (model, blend.model)]
            mixed = (1 - SHARE) * each[0] + SHARE * each[1]
            assert np.allclose(
                spoken.logp, mixed.log().gather(-1, torch.tensor(spoken.tokens)[:, None])[:, 0], atol=2e-5
            )
            u = uniform(7, 5, np.array([key(name)], np.uint64), np.array([sample]), np.arange(len(spoken.tokens)))
            drawn = torch.searchsorted(mixed.cumsum(-1), torch.from_numpy(u)[:, None])[:, 0]
            assert tuple(drawn.tolist()) == spoken.tokens


def test_the_whole_interval_gives_every_token_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not a sample: one row for each of 4096 even numbers counts the probability of every first token."""
    draws = 4096
    even = lambda *words: np.broadcast_to(
        (words[3] + 0.5) / draws, np.broadcast(*map(np.asarray, words[2:])).shape
    ).copy()
    monkeypatch.setattr(local, "uniform", even)
    model, blend = tiny("llama"), other("qwen2")
    sampling = Sampling(max_tokens=1, temperature=TAU)
    (said,) = speak(model, PROMPTS[:1], IDS[:1], samples=draws, rows=draws, sampling=sampling, blend=blend)
    counts = torch.bincount(torch.tensor([s.tokens[0] for s in said]), minlength=24) / draws
    each = [(forced(m, PROMPTS[0], (0,))[0] / TAU).softmax(-1) for m in (model, blend.model)]
    assert (counts - ((1 - SHARE) * each[0] + SHARE * each[1])).abs().max() <= 1 / draws
    assert (counts - each[0]).abs().max() > 0.02


@pytest.mark.parametrize("two", ["qwen3", "gpt2", "lfm2"])
def test_what_decodes_beside_a_row_does_not_matter(two: str) -> None:
    model, blend = tiny("llama"), other(two)
    whole = speak(model, blend=blend)
    for rows in (1, 4):
        assert flat(speak(model, rows=rows, blend=blend)) == flat(whole)
    assert flat(speak(model)) != flat(whole)


def test_the_ends_of_the_share() -> None:
    model, blend = tiny("llama"), other("qwen2", 1.0)
    assert flat(speak(model, blend=blend)) == flat(speak(blend.model))
    assert flat(speak(model, blend=other("qwen2", 1e-300))) == flat(speak(model))
    assert one("student").blended("teacher", 0.0) == one("student")
    assert build("minillm", {"alpha": 0.0, "pretrain": 0.0}).speaks == one("student")


def test_ids_that_are_not_words_are_not_spoken_by_either() -> None:
    said = speak(tiny("llama"), vocab=16, samples=20, blend=other("qwen2"))
    assert max(t for tokens in flat(said) for t in tokens) < 16
    model, blend = tiny("llama"), other("qwen2")
    (spoken,) = speak(model, PROMPTS[:1], IDS[:1], samples=1, vocab=16, blend=blend)[0]
    each = [forced(m, PROMPTS[0], spoken.tokens)[:, :16].softmax(-1) for m in (model, blend.model)]
    mixed = ((1 - SHARE) * each[0] + SHARE * each[1]).log()
    assert np.allclose(spoken.logp, mixed.gather(-1, torch.tensor(spoken.tokens)[:, None])[:, 0], atol=2e-5)


def test_modes_are_put_back_and_a_blend_is_not_greedy() -> None:
    model, blend = tiny("llama").train(), other("gpt2")
    blend.model.train()
    speak(model, blend=blend)
    assert model.training and blend.model.training
    with pytest.raises(UsageError, match="a blend of two models is sampled from"):
        speak(model, sampling=Sampling(max_tokens=3, temperature=0), blend=blend)


# --- a step's rollouts ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def people() -> tuple[Student, Teachers]:
    from opd.assemble import load_tokenizer

    tokenizer = load_tokenizer("world:student")
    student, teacher = (load(world.path(f"world:{name}"), vocab=len(tokenizer)) for name in ("student", "teacher"))
    voice = renderer(tokenizer, stop_ids=student.stop_ids)
    return Student(student, Optim()), Teachers(voice, student, {"teacher": teacher})


def rollouts(people: tuple[Student, Teachers], method: Method, tau: float = TAU) -> list[Any]:
    student, teachers = people
    sampling = Sampling(max_tokens=8, temperature=tau)
    how = {"seed": 3, "step": 2, "cursor": 0, "rows": 16}
    prompts = [replace(p, responses=("a b",)) for p in world.prompts("sort", 6)]
    return speak_to(prompts, method, student=student, teachers=teachers, sampling=sampling, **how)


def test_behaviour_is_the_mixture_of_what_student_and_teacher_say_of_it(people: tuple[Student, Teachers]) -> None:
    from opd.batch import pack

    method = build("minillm", {"pretrain": 0.0, "group": 2})
    batch = pack(rollouts(people, method), temperature=TAU)
    assert len(batch.rollouts) == 12 and {r.speaker for r in batch.rollouts} == {"student"}
    student, teachers = people
    batch = teachers.hear(batch, method.needs)
    (judge,) = method.needs
    mixed = torch.logaddexp(student.logp(batch) + np.log(0.8), batch.judged(judge) + np.log(0.2))
    torch.testing.assert_close(batch.behaviour_N, mixed, atol=1e-4, rtol=0)
    assert (batch.behaviour_N - student.logp(batch)).abs().max() > 0.05


@pytest.mark.parametrize("lora", [None, 4])
@pytest.mark.parametrize(("own", "other"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_each_half_computes_in_its_own_type_and_adapter(lora: int | None, own: str, other: str) -> None:
    """The exact half is exact beside one that rounds: what is recorded differs from the mixture by the rounding of the
    other half alone, and by nothing where that half has almost no share."""
    from opd.assemble import load_tokenizer
    from opd.batch import pack

    tokenizer = load_tokenizer("world:student")
    vocab, place = len(tokenizer), {name: world.path(f"world:{name}") for name in ("student", "teacher")}
    student = load(place["student"], vocab=vocab, dtype=own, lora=lora)
    if lora:  # an adapter that does something
        with torch.no_grad():
            for name, weight in student.module.named_parameters():
                if "lora_B" in name:
                    weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(0))
    teacher = load(place["teacher"], vocab=vocab, dtype=other, frozen=True)
    voice = renderer(tokenizer, stop_ids=student.stop_ids)
    learner, teachers = Student(student, Optim()), Teachers(voice, student, {"teacher": teacher})
    share = 0.999 if other == "float32" else 0.001  # nearly all of it by the half that is exact
    method = build("minillm", {"pretrain": 0.0, "alpha": share})
    batch = teachers.hear(pack(rollouts((learner, teachers), method), temperature=TAU), method.needs)
    (judge,) = method.needs
    mixed = torch.logaddexp(learner.logp(batch) + np.log(1 - share), batch.judged(judge) + np.log(share))
    likely = mixed > -4  # where the rounded half is not most of what there is
    assert (batch.behaviour_N - mixed)[likely].abs().max() < 1e-2
    assert (batch.behaviour_N - mixed).abs().median() < 1e-4
    assert all(p.requires_grad == ("lora" in n) for n, p in student.module.named_parameters()) or not lora


def test_without_a_share_the_rollouts_are_the_plain_students(people: tuple[Student, Teachers]) -> None:
    plain = rollouts(people, build("token_opd"))
    assert rollouts(people, build("minillm", {"alpha": 0.0, "pretrain": 0.0})) == plain
    assert [r.tokens for r in rollouts(people, build("minillm", {"pretrain": 0.0}))] != [r.tokens for r in plain]
    spoken = rollouts(people, build("minillm"))
    assert [r.speaker for r in spoken] == ["student", "data"] * 6, "the corpus comes as rows of its own"


def test_evaluation_is_the_students_alone(people: tuple[Student, Teachers], monkeypatch: pytest.MonkeyPatch) -> None:
    from opd import teachers as teachers_module

    asked: list[Any] = []
    plain = teachers_module.generate
    monkeypatch.setattr(teachers_module, "generate", lambda *a, **k: asked.append(k["blend"]) or plain(*a, **k))
    student, teachers = people
    sampling = Sampling(max_tokens=4)
    answer(student.model, teachers, world.prompts("sort", 2), sampling, samples=1, rewards=(), seed=0, rows=8)
    rollouts(people, build("minillm"))
    assert asked[0] is None and asked[1] is not None


# --- what a recipe is told --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gives", [Says.TEXT, Says.TOKEN])
def test_a_teacher_without_distributions_is_refused(gives: Says) -> None:
    method = Method(one("student").blended("teacher", 0.2), build("grpo").loss, name="mine")
    told = (
        r"needs the whole next-token distribution of `teacher` to draw every token from a blend of it and the student"
    )
    with pytest.raises(UsageError, match=told):
        bind(method, Setting({"teacher": gives}, reward=True))
    bind(method, Setting({"teacher": Says.DENSE}, reward=True))


def test_a_blend_is_of_the_whole_distribution() -> None:
    with pytest.raises(UsageError, match="set it back to its full value"):
        bind(build("minillm"), Setting({"teacher": Says.DENSE}, responses=True, truncated_sampling="top_p = 0.9"))


def test_speakers_say_who_blends() -> None:
    assert str(build("minillm").speaks) == "student (each token 0.2 teacher + 0.8 student) and data"
    assert both("student", "data").blended("teacher", 0.2).names == ("student", "data")


def test_a_scheduled_share_is_that_of_the_step() -> None:
    speaks = build("distillm", {"form": "skew_forward_kl", "on_policy": linear(0.0, 1.0, 4)}).speaks
    assert set(speaks.names) == {"student", "data"} and str(speaks) == "linear(0, 1, 4) student + linear(1, 0, 4) data"
    had = [sum(speaks.of(20 * step + i, step) == ("student",) for i in range(20)) for step in range(6)]
    assert had == pytest.approx([0, 5, 10, 15, 20, 20], abs=1)
    for wrong in (1.5, linear(0.0, 1.5, 4)):
        with pytest.raises(UsageError, match="shares lie between 0 and 1"):
            build("distillm", {"form": "skew_forward_kl", "on_policy": wrong})
