"""What a judge reads in place of the student's prompt: templates, rows that keep their tokens, probabilities."""

from __future__ import annotations

import math
from dataclasses import replace

import driven
import pytest
import torch
from driven import metrics, run, short

from opd.assemble import load_tokenizer, model_path
from opd.batch import pack
from opd.chat import renderer
from opd.credits import log_ratio
from opd.divergences import Divergence
from opd.errors import OpdError, UsageError
from opd.gates import heard
from opd.loss import match, push
from opd.method import build
from opd.model import load
from opd.student import Optim, Student
from opd.teachers import Teachers
from opd.types import Judge, Message, Prompt, Rollout, Says, Turn
from opd.views import View, reread, shown, wrapped

PROMPT = Prompt(
    (Message("user", "sba>"),), ("ab", "later"), "ab", meta={"context": "up", "level": 3, "tags": ["x"], "hint": "no"}
)


# --- templates --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{prompt}", "sba>"),
        ("{context};{prompt}", "up;sba>"),
        ("={answer};{prompt}/{response}", "=ab;sba>/ab"),
        ("{level}: {prompt}", "3: sba>"),
        ("see main.py:12 {prompt}", "see main.py:12 sba>"),  # a text that speaks of a file is no file
        ("{Not} {prompt} {}", "{Not} sba> {}"),
        ("{tags}{prompt}", None),  # a list is no text
        ("{missing}{prompt}", None),
        ("{hint}{prompt}", None),  # of the hint, not of a column that is called so
    ],
)
def test_a_template_is_filled_or_there_is_no_view(template, text):
    seen = View("answer", template).of(PROMPT)
    assert (None if seen is None else seen.messages) == (None if text is None else (Message("user", text),))


def test_what_is_filled_in_is_not_read_again():
    prompt = replace(PROMPT, messages=(Message("user", "{answer} {context}"),), answer="{prompt}")
    assert View("answer", "{prompt}|{answer}").of(prompt).messages[-1].content == "{answer} {context}|{prompt}"


def test_only_the_last_message_is_rewritten_and_the_rest_stays():
    chat = (Message("system", "be {kind}"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    seen = View("answer", "{prompt}+{answer}").of(replace(PROMPT, messages=chat, where="p.jsonl:3"))
    assert seen.messages == (*chat[:3], Message("user", "c+ab"))
    assert (seen.where, seen.answer, seen.responses) == ("p.jsonl:3", "ab", PROMPT.responses)
    assert seen.id != PROMPT.id


def test_the_first_recorded_response_stands_for_a_missing_answer():
    assert View("answer", "{answer}").of(replace(PROMPT, answer=None)).text == "ab"
    assert View("answer", "{answer}").of(replace(PROMPT, answer=None, responses=())) is None


def test_a_function_of_ones_own(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def louder(prompt, hint):\n    return None if prompt.answer is None else prompt.text.upper() + (hint or '')\n"
        "def wrong(prompt, hint):\n    return 7\n"
    )
    view = View("hint", "./mine.py:louder", tmp_path)
    assert view.of(PROMPT).text == "SBA>" and view.of(PROMPT, " h").text == "SBA> h" and view.looks_back
    assert view.of(replace(PROMPT, answer=None)) is None
    with pytest.raises(UsageError, match=r"views.answer: `./mine.py:wrong` gave 7"):
        View("answer", "./mine.py:wrong", tmp_path).of(PROMPT)
    with pytest.raises(UsageError, match="has no function `absent`"):
        View("answer", "./mine.py:absent", tmp_path).of(PROMPT)


def test_prompts_that_lack_a_field_are_refused_with_their_place():
    bare = replace(PROMPT, meta={}, where="p.jsonl:7")
    with pytest.raises(UsageError, match=r"1 of 2 .* view `context` \(the first: p.jsonl:7\).* context.*views.context"):
        shown(View("context", "{context};{prompt}"), [PROMPT, bare], "data.train")
    with pytest.raises(UsageError, match=r"1 of 2 prompts of p.jsonl have nothing for its `wrap`.*change its `wrap`"):
        wrapped("{context};{prompt}", [PROMPT, bare], "p.jsonl")
    assert [p.text for p in wrapped("{prompt} /no_think", [PROMPT], "p")] == ["sba> /no_think"]


def test_hints_are_for_their_view_alone(tmp_path):
    with pytest.raises(UsageError, match=r"shows \{hint\}, which only `views.hint` can"):
        short(tmp_path, "opsd", views={"answer": "{prompt} {hint}"})


# --- rows -------------------------------------------------------------------------------------------------------------


def turns() -> Rollout:
    """Two turns with something given between them."""
    nan, spoken = math.nan, (-0.5, -0.25)
    return Rollout(
        PROMPT,
        "student",
        tokens=(7, 8, 1, 2, 5, 6, 3, 4),
        mask=(False, False, True, True, False, False, True, True),
        behaviour=(nan, nan, *spoken, nan, nan, *spoken),
        version=(-1, -1, 4, 4, -1, -1, 4, 4),
        turns=(Turn(2, 4, "stop"), Turn(6, 8, "length")),
        text="later",
        sample=3,
        reward=0.5,
    )


@pytest.mark.parametrize("context", [(9,), (9, 9), (9, 9, 9, 9, 9)])
def test_another_prompt_leaves_the_answer_as_it_was(context):
    before, after = turns(), reread(turns(), context)
    assert after.tokens == (*context, *before.tokens[2:])
    pick = lambda r, what: [x for x, m in zip(getattr(r, what), r.mask, strict=True) if m]
    for what in ("tokens", "behaviour", "version"):
        assert pick(after, what) == pick(before, what)
    assert [after.tokens[t.start : t.end] for t in after.turns] == [(1, 2), (3, 4)]
    assert [t.finish for t in after.turns] == ["stop", "length"]
    assert all(math.isnan(x) for x, m in zip(after.behaviour, after.mask, strict=True) if not m)
    assert (after.text, after.sample, after.reward, after.prompt) == ("later", 3, 0.5, PROMPT)


# --- probabilities ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny():
    """A real model in float64, its renderer, and rows of unequal prompts and answers, one with two turns."""
    model = load(model_path("world:student"), dtype="float64")
    voice = renderer(load_tokenizer("world:student"), stop_ids=model.stop_ids)
    model = replace(model, head=replace(model.head, vocab=len(voice.tokenizer)))
    rows = []
    for text, answer in (("sba>", "ab"), ("g3k7a>", "37ka"), ("rkq,47>", "[kq:47]")):
        prompt = Prompt((Message("user", text),), answer=answer)
        ids = voice.answer_ids(answer)
        rows.append(voice.spoken(prompt, voice.prompt_ids(prompt), ids, (-1.0,) * len(ids), "stop", "student", 0, 0))
    first = rows[0]
    more = voice.answer_ids("ba")
    rows.append(
        replace(
            first,
            tokens=(*first.tokens, 9, 10, *more),
            mask=(*first.mask, False, False, *(True,) * len(more)),
            behaviour=(*first.behaviour, math.nan, math.nan, *(-1.0,) * len(more)),
            version=(*first.version, -1, -1, *(0,) * len(more)),
            turns=(*first.turns, Turn(len(first.tokens) + 2, len(first.tokens) + 2 + len(more), "stop")),
        )
    )
    return model, voice, rows


def hear(tiny, view, says, judge=None, **more):
    model, voice, rows = tiny
    judge = judge or Judge("student", view.name)
    teachers = Teachers(voice, model, views={view.name: view}, **more)
    return judge, teachers.hear(pack(rows, temperature=1.3, dtype=torch.float64), {judge: says})


def naive(tiny, view):
    """[N] at temperature 1.3: one row at a time, through the model's own logits."""
    model, voice, rows = tiny
    out = []
    for rollout in rows:
        start = rollout.turns[0].start
        context = voice.prompt_ids(view.of(rollout.prompt))
        ids = torch.tensor([[*context, *rollout.tokens[start:]]])
        with torch.no_grad():
            logp_TV = (model.module(input_ids=ids).logits[0, :, : model.head.vocab] / 1.3).log_softmax(-1)
        spoken = [p for p, m in enumerate(rollout.mask) if m]
        out += [logp_TV[p - start + len(context) - 1, rollout.tokens[p]] for p in spoken]
    return torch.stack(out)


@pytest.mark.parametrize("says", [Says.TOKEN, Says.DENSE])
@pytest.mark.parametrize("layout", ["right", "left", "packed"])
def test_a_view_is_the_same_answer_after_another_prompt(tiny, layout, says):
    view = View("answer", "={answer};{prompt}")
    own = replace(tiny[0], layout=layout)
    judge, batch = hear((own, *tiny[1:]), view, says)
    torch.testing.assert_close(batch.judged(judge), naive(tiny, view), rtol=1e-9, atol=1e-9)
    assert batch.signals[judge].heard_N is None
    same = naive(tiny, View("answer", "{prompt}"))
    assert (batch.judged(judge) - same).abs().max() > 0.1, "the view says something"


@pytest.mark.parametrize("teacher", ["student", "reference"])
def test_a_view_that_shows_nothing_teaches_nothing(tiny, teacher):
    """OPSD of equal prompts and weights: loss and gradient are 0."""
    model, view = tiny[0], View("answer", "{prompt}")
    _, batch = hear(tiny, view, Says.DENSE, Judge(teacher, "answer"), reference=model.frozen_copy("reference"))
    student = Student(model, Optim())
    student.optimizer.zero_grad()
    stats = student.gradient(batch, build("opsd", {"teacher": teacher}).loss)
    assert abs(stats["loss/total"]) < 1e-12
    assert max(float(p.grad.abs().max()) for p in model.module.parameters() if p.grad is not None) < 1e-12
    student.optimizer.zero_grad()


def test_the_live_judge_is_the_student_as_it_was_when_it_was_heard(tiny):
    """Its head is tied and learns: a later update on the same batch must not move what it said."""
    model = replace(tiny[0].frozen_copy("live"))
    model.module.requires_grad_(True)
    judge, batch = hear((model, *tiny[1:]), View("answer", "={answer};{prompt}"), Says.DENSE)
    before = batch.signals[judge].logits(slice(None)).clone()
    with torch.no_grad():
        model.head.weight.mul_(1.5)
    assert torch.equal(batch.signals[judge].logits(slice(None)), before)


# --- what is not there ------------------------------------------------------------------------------------------------


def test_rows_without_a_view_are_refused_unless_a_gate_says_what_happens(tiny):
    model, voice, rows = tiny
    told = [replace(r, hint="a" if i % 2 else None) for i, r in enumerate(rows)]
    view, judge = View("hint", "={hint};{prompt}"), Judge("student", "hint")
    student = Student(model, Optim())
    for says, plain in ((Says.TOKEN, push(log_ratio(judge))), (Says.DENSE, match(judge, Divergence("reverse_kl")))):
        judge, batch = hear((model, voice, told), view, says, judge)
        rows_heard = batch.heard(judge)
        assert torch.equal(rows_heard, torch.tensor([float(r % 2) for r in batch.row_N.tolist()], dtype=torch.float64))
        with pytest.raises(
            OpdError, match=r"loss tokens of .* have no finite value for the log-probability of `student"
        ):
            student.gradient(batch, plain)
        alone = batch.rows([1, 3])
        student.optimizer.zero_grad()
        gated = student.gradient(batch, plain.where(heard(judge)))["loss/total"]
        share = float(rows_heard.mean())
        assert gated == pytest.approx(student.gradient(alone, plain)["loss/total"] * share, rel=1e-9)
    student.optimizer.zero_grad()


@pytest.mark.parametrize("says", [Says.TOKEN, Says.DENSE])
def test_a_step_in_which_nobody_is_heard(tiny, says):
    judge, batch = hear(tiny, View("hint", "={hint};{prompt}"), says, Judge("student", "hint"))
    assert not batch.heard(judge).any()
    loss = push(log_ratio(judge).where(heard(judge)))
    student = Student(tiny[0], Optim())
    student.optimizer.zero_grad()
    assert student.gradient(batch, loss)["loss/total"] == 0
    assert all(not p.grad.any() for p in tiny[0].module.parameters() if p.grad is not None)
    student.optimizer.zero_grad()


def test_a_row_that_its_judge_cannot_hold_is_not_heard(tiny):
    view = View("answer", "={answer};{prompt}")
    longest = max(len(reread(r, tiny[1].prompt_ids(view.of(r.prompt))).tokens) for r in tiny[2])
    judge, batch = hear(tiny, view, Says.TOKEN, rooms={"student": longest - 1})
    assert sorted(set(batch.row_N[batch.heard(judge) == 0].tolist())) == [2]
    assert batch.judged(judge)[batch.heard(judge) == 1].isfinite().all()


def test_a_prompt_that_is_too_long_with_its_view_is_refused_before_training(tmp_path):
    long = {"views": {"answer": "{prompt}" * 40}, "speak": {"max_tokens": 20}}
    with pytest.raises(
        UsageError, match=r"14 of 14 prompts are too long for `reference\[answer\]` \(the first: world:"
    ):
        run(short(tmp_path, "opsd", teachers=None, **long))
    assert not (tmp_path / "run").exists()


def test_long_hints_are_counted_as_missing(tmp_path):
    own = {"views": {"hint": "{hint}" + "{prompt}" * 40}, "hint": {"use": "world"}, "teachers": None}
    method = {"name": "hindsight", "binary": 1.0, "group": 2}
    _, folder = run(short(tmp_path, method, steps=2, **own))
    assert [row["view/hint_missing_share"] for row in metrics(folder)] == [1.0, 1.0]


def test_missing_hints_are_counted(tmp_path):
    method = {"name": "hindsight", "binary": 1.0, "group": 2}
    own = {"views": {"hint": "={hint};{prompt}"}, "hint": {"use": "world"}, "teachers": None}
    _, folder = run(short(tmp_path, method, steps=2, **own), watch=None)
    shares = [row["view/hint_missing_share"] for row in metrics(folder)]
    assert all(0 < s < 1 for s in shares)
    assert driven.events(folder, "stage")[0].count("[student[hint] heard]") == 1
