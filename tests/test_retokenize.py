"""A judge with another tokenizer, end to end: real tokenizers around exact models, and the built-in world's pair."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from required import WORLD, needs_world
from tabled import F64, gradient, relative
from tokenized import FAMILIES, byte_level, characters, sentencepiece, voice
from transformers import AutoTokenizer

from opd.aligned import SpanDense, SpanToken
from opd.api import load
from opd.assemble import assemble
from opd.batch import Batch, pack
from opd.chat import Renderer, renderer
from opd.engines.table import table_model
from opd.errors import OpdError, UsageError
from opd.legs import legs
from opd.method import RETOKENIZED_TEACHER, TEACHER, build
from opd.model import CausalModel
from opd.model import load as load_model
from opd.retokenize import crossing, hear
from opd.signals import Dense
from opd.teachers import Teachers
from opd.types import Message, Prompt, Rollout, Says, Turn

J = RETOKENIZED_TEACHER
CHATML = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


def ask(text: str = "the dog") -> Prompt:
    return Prompt((Message("user", text),))


def says(speaker: Renderer, text: str, prompt: Prompt | None = None, finished: bool = True) -> Rollout:
    """A rollout that the student sampled."""
    prompt = prompt or ask()
    tokens = (*speaker.verbatim_ids(text), *(speaker.stop_ids[:1] if finished else ()))
    finish = "stop" if finished else "length"
    return speaker.spoken(prompt, speaker.prompt_ids(prompt), tokens, [-1.0] * len(tokens), finish, "student", 0, 0)


def model(tokenizer: Any, seed: int, positions: int = 24) -> CausalModel:
    """A table over a tokenizer's vocabulary; it knows the position and the token before."""
    return replace(table_model(positions, len(tokenizer), seed), name=f"table {seed}")


def batch_of(*rollouts: Rollout) -> Batch:
    return pack(rollouts, temperature=1.0, dtype=F64)


def walked(teacher: CausalModel, row: tuple[int, ...], start: int) -> list[float]:
    """log p of every token of a row from `start` on, one conditional after the other."""
    logits_SV, size = teacher.module.model.logits_SV.detach(), teacher.head.vocab
    return [float(logits_SV[(p - 1) * size + row[p - 1]].log_softmax(-1)[row[p]]) for p in range(start, len(row))]


# --- what the judge reads --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", FAMILIES)
@pytest.mark.parametrize("judge", FAMILIES)
def test_spans_sum_to_the_probability_of_the_judges_own_tokens(student: str, judge: str) -> None:
    """Each answer, its stop token included, as the teacher would write it behind its own rendering of the prompt."""
    speaker, reader = voice(FAMILIES[student]()), voice(FAMILIES[judge](), template=CHATML)
    teacher = model(FAMILIES[judge](), 3, positions=72)
    texts = ["the quick brown dog", "and the lazy fox", "12 hens"]
    batch = batch_of(*(says(speaker, text) for text in texts), says(speaker, "the end of", finished=False))
    signal = hear(batch, teacher, speaker, reader, Says.TOKEN)
    assert isinstance(signal, SpanToken) and bool(signal.alignment.inside_N.all())
    for row, text in enumerate([*texts, "the end of"]):
        prompt = reader.prompt_ids(ask())
        own = (*prompt, *reader.verbatim_ids(text), *reader.stop_ids[: row < 3])
        total = float(signal.logp_N[batch.row_N == row].sum())
        assert total == pytest.approx(sum(walked(teacher, own, len(prompt))), rel=1e-10)
    dense = hear(batch, teacher, speaker, reader, Says.DENSE)
    assert isinstance(dense, SpanDense)
    assert torch.allclose(dense.logp(batch.token_N, 1.0), signal.logp_N)


def test_merged_rows_of_the_judge_are_the_chain_rule() -> None:
    """byte_level says "the" where the teacher says "t", "h", "e": p(t) p(h | t) p(any | th), against the table."""
    speaker, reader = voice(byte_level()), voice(characters())
    teacher = model(characters(), 3)
    batch = batch_of(says(speaker, "the dog"))
    signal = hear(batch, teacher, speaker, reader, Says.DENSE)
    assert isinstance(signal, SpanDense)
    n = len(batch.row_N)
    student = torch.randn(n, len(byte_level()), generator=torch.Generator().manual_seed(0), dtype=F64).log_softmax(-1)
    pair = signal.cross(student, batch.token_N, torch.arange(n), 1.0, "span")
    prompt, t, h, *_ = reader.prompt_ids(ask()), *reader.verbatim_ids("the dog")
    row = (*prompt, t, h)
    before = sum(walked(teacher, row, len(prompt)))
    logits = teacher.module.model.logits_SV.detach()[(len(row) - 1) * len(characters()) + h]
    assert torch.allclose(pair.t_gW[0], before + logits.log_softmax(-1), atol=1e-12)
    assert torch.equal(pair.s_gV, student) and pair.place_g.tolist() == [*range(n)]  # one token a span, on this side
    spelled = crossing(speaker, reader)
    ends = lambda g: {
        (spelled.mine.pieces[i], spelled.theirs.pieces[j])
        for i, j in zip(*(x.tolist() for x in signal.shared.of(pair.entry_g[g : g + 1])[1:]), strict=True)
    }
    assert (b"the", b"e") in ends(0) and all(s == b"th" + t for s, t in ends(0) if s and t)
    assert (b" dog", b"g") in ends(1) and all(s == b" do" + t for s, t in ends(1) if s and t)
    assert int(pair.entry_g[2]) == 0  # the stop tokens
    assert (speaker.stop_ids[0], reader.stop_ids[0]) in crossing(speaker, reader).shared


@pytest.mark.parametrize("family", FAMILIES)
def test_one_tokenizer_on_both_sides_is_gkd(family: str) -> None:
    """Loss and gradient to 1e-10, through the text and back."""
    tokenizer = FAMILIES[family]()
    speaker, student, teacher = voice(tokenizer), model(tokenizer, 1), model(tokenizer, 2)
    batch = batch_of(*(says(speaker, text) for text in ("the dog", "and the fox", "12")))
    plain = replace(batch, signals={TEACHER: Dense(teacher.all_hidden(batch), teacher.head)})
    crossed = replace(batch, signals={J: hear(batch, teacher, speaker, speaker, Says.DENSE)})
    want, stats = gradient(student, plain, build("gkd", {"on_policy": 1.0}).loss)
    got, same = gradient(student, crossed, build("gold").loss)
    assert relative(got, want) < 1e-10
    assert same["loss/total"] == pytest.approx(stats["loss/total"], rel=1e-10)
    assert same["align/spans_per_token"] == 1 and same["align/unmapped_share"] == 0


def test_what_cannot_be_aligned_is_masked_and_counted() -> None:
    speaker, reader = voice(sentencepiece()), voice(characters())
    teacher, student = model(characters(), 2), model(sentencepiece(), 1)
    batch = batch_of(says(speaker, "the dog Q"), says(speaker, "the dog"))
    signal = hear(batch, teacher, speaker, reader, Says.DENSE)
    assert (~signal.alignment.inside_N).sum() == 1
    loss = build("gold").loss
    grad, stats = gradient(student, replace(batch, signals={J: signal}), loss)
    assert stats["align/unmapped_share"] == pytest.approx(1 / len(batch.row_N)) and grad.isfinite().all()
    plain = build("gold", {"form": "push"}).loss
    heard = replace(batch, signals={J: hear(batch, teacher, speaker, reader, Says.TOKEN)})
    assert gradient(student, heard, plain)[1]["loss/total"] == pytest.approx(
        gradient(student, heard, plain, tile=1, micro=1)[1]["loss/total"], rel=1e-10
    )


@needs_world
def test_a_real_model_reads_a_real_students_text() -> None:
    """What the spans of a text sum to is what Hugging Face's own forward gives for the teacher's tokens of it."""
    student, judge = (
        renderer(AutoTokenizer.from_pretrained(str(WORLD / "models" / name)), stop_ids=(1,))
        for name in ("stories260K", "babyllama105")
    )
    teacher = load_model(WORLD / "models" / "babyllama105", dtype="float64", frozen=True)
    prompt, text = ask("Once upon a time, there was a cat."), 'The cat was happy and said, "I can run!"'
    batch = batch_of(says(student, text, prompt))
    signal = hear(batch, teacher, student, judge, Says.TOKEN)
    before, answer = judge.prompt_ids(prompt), (*judge.verbatim_ids(text), 1)
    with torch.no_grad():
        logits = teacher.module(input_ids=torch.tensor([[*before, *answer]])).logits[0].double()
    logp = logits[len(before) - 1 : -1].log_softmax(-1).gather(-1, torch.tensor(answer)[:, None]).sum()
    assert bool(signal.alignment.inside_N.all()) and len(answer) > len(batch.row_N)
    assert float(signal.logp_N.sum()) == pytest.approx(float(logp), rel=1e-9)


# --- what cannot be read ---------------------------------------------------------------------------------------------


def test_nothing_in_common_stops_the_run() -> None:
    speaker, reader = voice(byte_level()), voice(characters("xyz"))
    with pytest.raises(OpdError, match="none of the 2 tokens of this batch's answers could be aligned"):
        hear(batch_of(says(speaker, "to", finished=False)), model(characters("xyz"), 1), speaker, reader, Says.TOKEN)


def test_a_row_that_does_not_fit_into_the_judges_window_stops_the_run() -> None:
    speaker, reader = voice(byte_level()), voice(characters())
    small = model(characters(), 1, positions=12)
    with pytest.raises(OpdError, match=r"are 16 tokens to table 1, which holds 12: lower speak\.max_tokens"):
        hear(batch_of(says(speaker, "the hens")), small, speaker, reader, Says.TOKEN)


def test_an_answer_of_several_turns_is_not_read() -> None:
    speaker = voice(byte_level())
    rollout = says(speaker, "the dog")
    twice = replace(rollout, turns=(Turn(1, 2, "stop"), Turn(2, 3, "stop")))
    with pytest.raises(OpdError, match="an answer of 2 turns"):
        hear(batch_of(twice), model(byte_level(), 1), speaker, speaker, Says.TOKEN)


# --- in a run --------------------------------------------------------------------------------------------------------

RECIPE = """\
student: {{model: world:{student}}}
teachers: {{teacher: {{model: world:{teacher}}}}}
data: {{train: world:sort:8, dev: world:sort:4}}
reward: task
method: {method}
speak: {{max_tokens: 12}}
train: {{lr: 1e-4, prompts: 4, steps: 2}}
run: {{threads: 1, save_every: 0}}
"""
MERGED, PLAIN = "student-merged", "teacher"


def recipe(folder: Path, method: str, student: str = MERGED, teacher: str = PLAIN) -> Any:
    path = folder / "r.yaml"
    path.write_text(RECIPE.format(method=method, student=student, teacher=teacher))
    return load(path, f"run.dir={folder / 'runs'}")


def test_teachers_read_by_their_own_voices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("opd.cast.parameters", lambda _: 0)  # of a table there is nothing to say
    speaker, reader = voice(byte_level()), voice(characters())
    teacher = model(characters(), 2)
    own = Teachers(speaker, model(byte_level(), 1), {"teacher": teacher}, voices={"teacher": reader})
    batch = own.hear(batch_of(says(speaker, "the dog")), {J: Says.TOKEN})
    want = hear(batch, teacher, speaker, reader, Says.TOKEN)
    assert torch.equal(batch.signals[J].logp_N, want.logp_N)


@pytest.mark.parametrize("method", ["gold", "{name: gold, form: push}", "uld"])
@pytest.mark.parametrize(("student", "teacher"), [(MERGED, PLAIN), ("student", MERGED), (MERGED, MERGED)])
def test_any_pair_of_the_built_in_world_trains(method: str, student: str, teacher: str, tmp_path: Path) -> None:
    import opd

    run = opd.run(recipe(tmp_path, method, student, teacher))
    steps = [row for row in run.metrics() if "event" not in row]
    assert len(steps) == 2 and all(row["grad/norm"] > 0 and row["align/unmapped_share"] == 0 for row in steps)
    assert run.summary["status"] == "finished"


def test_a_run_says_how_far_the_vocabularies_agree(tmp_path: Path) -> None:
    loaded = recipe(tmp_path, "gold")
    parts = assemble(loaded.recipe, legs(loaded.recipe), tmp_path, "cpu")
    assert any("`teacher` reads answers in tokens of its own: 61 of its 61" in note for note in parts.notes)
    assert parts.teachers.model("teacher").head.vocab == 61


@pytest.mark.parametrize("method", ["gkd", "token_opd", "{name: gkd, on_policy: 1.0}"])
def test_other_methods_still_want_one_tokenizer(method: str, tmp_path: Path) -> None:
    loaded = recipe(tmp_path, method)
    with pytest.raises(UsageError, match=r"do not share a tokenizer: .* or one that aligns the two: gold, uld"):
        assemble(loaded.recipe, legs(loaded.recipe), tmp_path, "cpu")
