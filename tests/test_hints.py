"""Hindsight: what came next, turned into a hint by a rule or a judge, and runs that learn from it."""

from __future__ import annotations

from functools import partial

import driven
import pytest
from driven import differences, events, metrics, run, short

from opd import hints
from opd import teachers as teachers_module
from opd.engines.base import Spoken
from opd.errors import UsageError
from opd.hints import ASK, drawn, question, rule, with_hints
from opd.teachers import Teachers
from opd.types import Message, Prompt, Rollout, Turn

LONG = "start with the digits"


def said(text: str, asked: str = "sba>", speaker: str = "student", domain: str = "sort") -> Rollout:
    prompt = Prompt((Message("user", asked),), domain=domain)
    return Rollout(prompt, speaker, (1, 2), (False, True), (0.0, -1.0), (-1, 0), (Turn(1, 2, "stop"),), text)


# --- the rule ---------------------------------------------------------------------------------------------------------


def test_the_worlds_rule_tells_how_a_wrong_answer_should_have_begun():
    follows = rule("world")
    assert [follows("sba>", text) for text in ("ab", "ba", "aa", "")] == [None, "a", "ab", "a"]
    rows = with_hints([said("ba"), said("ab"), said("ba", speaker="teacher")], follows, None)
    assert [r.hint for r in rows] == ["a", None, None]


def test_a_rule_of_ones_own_and_no_other_name(tmp_path):
    (tmp_path / "mine.py").write_text("def next_turn(prompt, answer):\n    return f'{prompt}|{answer}'\n")
    assert rule("./mine.py:next_turn", tmp_path)("p", "a") == "p|a"
    with pytest.raises(UsageError, match=r"hint.use is `wrold`: it is `world`, or your own function"):
        rule("wrold")


# --- the judge --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("replies", "hint"),
    [
        ([f"[HINT_START] {LONG} [HINT_END]"], LONG),
        (["NONE", "no hint"], None),
        (["[HINT_START]0123456789[HINT_END]"], None),  # ten characters say too little
        (["[HINT_START]0123456789a[HINT_END]"], "0123456789a"),
        ([f"[HINT_START]{LONG}[HINT_END]", f"[HINT_START]{LONG}, then\nletters[HINT_END]"], f"{LONG}, then\nletters"),
        (["[HINT_START]never closed and long"], None),
        ([], None),
    ],
)
def test_the_longest_hint_that_says_enough(replies, hint):
    assert drawn(replies) == hint


def test_the_judge_is_asked_only_where_something_came_next_and_its_hint_replaces_the_text():
    asked = []

    def judge(questions):
        asked.extend(questions)
        return [[f"[HINT_START]{LONG}[HINT_END]"], ["NONE"]]

    rows = with_hints([said("ab"), said("ba"), said("aa")], rule("world"), judge)
    assert [r.hint for r in rows] == [None, LONG, None]
    assert len(asked) == 2 and all(q.domain == "sort" for q in asked)
    assert with_hints([said("ab")], rule("world"), lambda _: pytest.fail("nobody is to be asked"))[0].hint is None


def test_what_a_question_quotes_is_not_read_again():
    text = question(said("{next} {prompt}", asked="{answer}"), "{prompt}").text
    start = ASK.partition("{prompt}")[0]
    assert text.startswith(start + "{answer}\n\nReply:\n{next} {prompt}\n\nWhat came next:\n{prompt}\n\n")


class Voice:
    """Tokens are characters."""

    def prompt_ids(self, prompt):
        return tuple(map(ord, prompt.text))

    def text(self, tokens):
        return "".join(map(chr, tokens))


def test_votes_are_counted_and_the_same_question_is_asked_once(monkeypatch):
    calls = []

    def speak_with(model, voice, prompts, samples, sampling, seed, step, rows):
        calls.append(([p.text for p in prompts], samples, step))
        reply = lambda k: tuple(map(ord, f"[HINT_START]{LONG}{'!' * k}[HINT_END]"))
        return [[Spoken(reply(k), (0.0,), "stop") for k in range(samples)] for _ in prompts]

    monkeypatch.setattr(teachers_module, "speak_with", speak_with)
    monkeypatch.setattr(Teachers, "model", lambda self, role: role)
    own = Teachers(Voice(), None, came_next=rule("world"), hint_judge=("judge", 3))
    rows = own.look_back([said("ba"), said("ba"), said("aa"), said("ab")], step=5)
    ((texts, votes, step),) = calls
    assert (len(texts), len(set(texts)), votes, step) == (2, 2, 3, 5)
    assert [r.hint for r in rows] == [f"{LONG}!!"] * 3 + [None]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("judge", ["nobody", "texts"])
def test_a_judge_of_hints_is_a_teacher_that_can_speak(tmp_path, judge):
    teachers = {"texts": {"answers": "some.jsonl"}, "able": {"model": "world:teacher"}}
    with pytest.raises(UsageError, match=rf"is '{judge}', and no teacher with a `model` .*Found teacher, able"):
        short(tmp_path, "hindsight", hint={"use": "world", "judge": judge}, teachers=teachers)


def test_hindsight_without_hints_is_refused_before_anything_loads(tmp_path):
    with pytest.raises(UsageError, match=r"lets `student` see `hint`, and the recipe does not say where hints come"):
        run(short(tmp_path, "hindsight"))


JUDGED = {
    "views": {"hint": "={hint};{prompt}"},
    "hint": {"use": "world", "judge": "teacher", "votes": 2},
    "data": {"train": "world:sort:14"},
}


def test_a_run_with_a_judge_asks_it_and_goes_on_exactly(tmp_path, monkeypatch):
    """The built-in teacher writes no marks, so its whole reply is taken here; hints depend on step and question alone.
    One question in two is longer than the judge can hold, and gets no hint."""
    monkeypatch.setattr(teachers_module, "with_hints", partial(_unmarked, teachers_module.with_hints))
    monkeypatch.setattr(hints, "ASK", "{next};{prompt}" + "{answer}" * 26)
    method = {"name": "hindsight", "group": 2, "binary": 0.5, "kl": 0.01}
    make = lambda name: short(tmp_path, method, steps=4, name=name, **JUDGED, run=own | {"name": name})
    own = {"threads": 1, "dir": str(tmp_path), "save_every": 2, "keep": 9, "sample_rows": 9}
    whole = run(make("whole"))[1]
    with pytest.raises(driven.CrashError):
        run(make("run"), watch=driven.at_step(3, driven.crash))
    driven.resume(tmp_path / "run")
    assert not differences(whole, tmp_path / "run")
    assert any(0 < row["view/hint_missing_share"] < 1 for row in metrics(whole))
    assert events(tmp_path / "run", "resume") == ["went on from step 2"]


def _unmarked(with_hints, rollouts, came_next, judge):
    marked = lambda questions: [[f"[HINT_START]{t:#<11}[HINT_END]" for t in each] for each in judge(questions)]
    return with_hints(rollouts, came_next, marked)
