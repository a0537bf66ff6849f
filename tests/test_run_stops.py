"""Runs that cannot go on stop before harm is done: numbers that are none, a full disk, steps that teach nothing."""

import errno
import os
import resource
from dataclasses import replace

import driven
import pytest
import torch
from driven import BARE, at_step, differences, metrics, run, short, small

from opd import checkpoint, log, train
from opd.errors import OpdError
from opd.log import read, read_json


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(small(tmp_path_factory.mktemp("unbroken")))[1]


@pytest.fixture
def steps_taken(monkeypatch):
    """How often each optimizer has moved its weights."""
    taken = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *a: (taken.append(id(self)), step(self, *a))[1])
    return taken


# --- numbers that are none -------------------------------------------------------------------------------------------


REWARD = """
seen = 0

def sick(prompt, text):
    global seen
    seen += 1
    return float("nan") if seen > {healthy} else seen % 2
"""


def poisoned(monkeypatch, step, who):
    """Weights turn into nan before this step: the teacher's or the student's."""
    runs = driven.opened(monkeypatch)

    def poison():
        parts = runs[-1].parts
        model = parts.student if who == "student" else parts.teachers.models[who]
        with torch.no_grad():
            next(model.module.parameters()).fill_(float("nan"))

    return at_step(step - 1, poison)


@pytest.mark.parametrize(
    ("method", "term"),
    [
        ({"name": "gkd", "on_policy": 1.0}, r"loss/match_teacher is nan"),
        ("token_opd", r"loss tokens of push_teacher have no finite value for the log-probability of `teacher`"),
    ],
    ids=["dense", "token"],
)
def test_a_teacher_that_turns_into_nan_stops_before_the_weights_move(tmp_path, monkeypatch, steps_taken, method, term):
    chosen = short(tmp_path, method, steps=5, run={"save_every": 1})
    with pytest.raises(OpdError, match=rf"^step 3, stage `\w+`: .*{term}.*debug/step-000003.jsonl") as caught:
        run(chosen, watch=poisoned(monkeypatch, 3, "teacher"))
    folder = tmp_path / "run"
    assert len(steps_taken) == 2
    assert [row["step"] for row in metrics(folder)] == [1, 2]
    assert list(checkpoint.complete(folder / "checkpoints")) == [1, 2]
    said = read(folder / "debug" / "step-000003.jsonl")
    assert len(said) == 4 and all(
        row["text"] is not None and len(row["behaviour"]) == len(row["tokens"]) for row in said
    )
    summary = read_json(folder / "summary.json")
    assert (summary["status"], summary["reason"], summary["step"]) == ("failed", str(caught.value), 2)
    assert not (folder / "model").exists()


def test_a_reward_that_is_none_stops_with_its_prompt(tmp_path, steps_taken):
    path = tmp_path / "mine.py"
    path.write_text(REWARD.format(healthy=16))
    chosen = short(tmp_path, {"name": "grpo", "group": 4}, reward={"use": f"{path}:sick"})
    with pytest.raises(
        OpdError, match=r"^step 2, stage `grpo`: reward sick gave nan for an answer to .*debug/step-000002"
    ):
        run(chosen)
    assert len(steps_taken) == 1


def test_a_method_of_the_users_that_is_infinite(tmp_path, steps_taken):
    path = tmp_path / "mine.py"
    path.write_text(
        "from opd.loss import nll\nfrom opd.method import Method, one\nfrom opd.schedule import linear\n"
        "def wild():\n    return Method(speaks=one('data'), loss=linear(1, 1e300, 2) * nll())\n"
    )
    data = {"train": str(driven.answers(tmp_path / "train.jsonl", 8))}
    with pytest.raises(
        OpdError, match=r"^step 2, stage `wild`: .*loss/nll is inf.*no weight was changed.*--fork RUN@STEP"
    ):
        run(short(tmp_path, f"{path}:wild", data=data))
    assert len(steps_taken) == 1


def test_a_student_that_diverged_stops_where_it_speaks(tmp_path, monkeypatch):
    watch = poisoned(monkeypatch, 2, "student")
    with pytest.raises(OpdError, match=r"^step 2, stage `token_opd`: the speaker's logits were not finite"):
        run(short(tmp_path, "token_opd"), watch=watch)
    with pytest.raises(OpdError, match=r"^evaluation at step 1: the speaker's logits were not finite"):
        run(small(tmp_path, "other", stages=[{"method": "token_opd", "steps": 1}]), watch=watch)


# --- a full disk -----------------------------------------------------------------------------------------------------


def test_no_room_for_a_checkpoint(tmp_path, unbroken):
    """The limit of a file's size stands for the disk; `services/test_run_faults.py` fills a real one."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))

    try:
        with pytest.raises(OpdError, match=r"the checkpoint of step 3 could not be written.*step 2 is kept.*--resume"):
            run(small(tmp_path), watch=at_step(3, fill))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    folder = tmp_path / "run"
    assert list(checkpoint.complete(folder / "checkpoints")) == [2]
    assert not list(folder.rglob("*.tmp"))
    driven.resume(folder)
    assert not differences(unbroken, folder)


@pytest.mark.parametrize("what", ["metrics", "samples", "model"])
def test_no_room_for_a_line_or_the_model(tmp_path, unbroken, monkeypatch, what):
    folder = tmp_path / "run"
    write = os.write

    def full(handle, content):
        if what in os.readlink(f"/proc/self/fd/{handle}") and b'"step":5' in bytes(content):
            write(handle, bytes(content)[:20])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, content)

    with monkeypatch.context() as patch:
        if what == "model":
            patch.setattr("transformers.PreTrainedModel.save_pretrained", _no_space)
        patch.setattr(log.os, "write", full)
        with pytest.raises(OpdError, match=r"the disk is full.*--resume"):
            run(small(tmp_path))
    assert all(line.endswith(b"}") for line in (folder / "metrics.jsonl").read_bytes().splitlines())
    assert not (folder / "model").exists() and not (folder / ".model.tmp").exists()
    driven.resume(folder)
    assert not differences(unbroken, folder)


def _no_space(*_args, **_named):
    raise OSError(errno.ENOSPC, "No space left on device")


# --- steps that teach nothing ----------------------------------------------------------------------------------------


def test_steps_without_a_difference_take_no_step_and_end_the_run(tmp_path, monkeypatch, steps_taken):
    path = tmp_path / "mine.py"
    path.write_text("def same(prompt, text):\n    return 1.0\n")
    runs = driven.opened(monkeypatch)
    train_ = {"lr": 1e-3, "prompts": 4, "steps": 9, "max_empty_steps": 3, "weight_decay": 0.1}
    chosen = short(tmp_path, {"name": "grpo", "group": 3}, reward={"use": f"{path}:same"}, train=train_)
    summary, folder = run(chosen)
    assert not steps_taken
    assert (summary["status"], summary["step"]) == ("stopped", 3)
    assert summary["reason"].startswith("3 steps in a row had nothing to learn from; 100% of the groups")
    assert [row["grad/empty_steps"] for row in metrics(folder)] == [1, 2, 3]
    assert [row["group/degenerate_share"] for row in metrics(folder)] == [1, 1, 1]
    assert {row["grad/norm"] for row in metrics(folder)} == {0.0}
    start = dict(runs[0].student.model.module.named_parameters())
    assert all(weight.equal(start[name]) for name, weight in driven.weights(folder).items() if name in start)


def test_a_batch_without_a_row_is_an_empty_step(tmp_path, monkeypatch, steps_taken):
    """Every reward declines: nothing to pack, nothing to learn from, and it is counted."""
    declined = lambda rewards, rollouts: [replace(r, reward=None) for r in rollouts]
    monkeypatch.setattr(train.scoring, "score", declined)
    train_ = {"lr": 1e-3, "prompts": 4, "steps": 9, "max_empty_steps": 2}
    summary, folder = run(short(tmp_path, {"name": "grpo", "group": 3}, train=train_))
    assert summary["step"] == 2 and not steps_taken
    assert [row["reward/missing_share"] for row in metrics(folder)] == [1, 1]
    assert all(row["tokens/generated"] > 0 and row["tokens/trained"] == 0 for row in metrics(folder))


def test_a_critic_that_learns_alone_is_not_an_empty_step(tmp_path):
    stages = [{"method": {"name": "gad", "group": 3}, "critic": {"alone_steps": 4}, "steps": 5}]
    train_ = {"lr": 1e-3, "prompts": 3, "max_empty_steps": 1}
    summary, folder = run(small(tmp_path, stages=stages, train=train_, **BARE))
    assert summary["status"] == "finished"
    rows = metrics(folder)
    assert [row.get("grad/empty_steps") for row in rows] == [None] * 4 + [0]
    assert all("critic/loss" in row and row["lr/critic"] == 1e-3 for row in rows)
