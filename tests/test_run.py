"""Whole runs: stopped anywhere they go on to the same bytes, and where they cannot go on they say why."""

import random
import signal
import time
from functools import partial

import driven
import pytest
from driven import at_step, crash, die_in_checkpoint, differences, events, kill, metrics, run, short, small, wait_for

from opd import checkpoint, train
from opd.errors import OpdError, UsageError
from opd.log import RunFolder, read, read_json
from opd.mixture import Mixture
from opd.world import prompts as world_prompts

LORA = {"model": "world:student", "lora": 4}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    return run(small(tmp_path_factory.mktemp("unbroken")))[1]


# --- resume ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("student", [{}, LORA], ids=["full", "lora"])
def test_a_run_killed_anywhere_ends_as_an_unbroken_one(tmp_path, student):
    """Before the first checkpoint, inside the writing of a later one, and at a moment of no choice."""
    whole = run(small(tmp_path, "whole", student=student))[1]
    folder = tmp_path / "run"
    for chosen, doomed, left in ((small(tmp_path, student=student), 1, []), (None, 2, [2])):
        process = driven.begin(chosen, folder, partial(die_in_checkpoint, doomed))
        process.join()
        assert process.exitcode == -9
        assert list(checkpoint.complete(folder / "checkpoints")) == left
        assert list(folder.glob("checkpoints/*.tmp"))
    process, before = driven.begin(None, folder), driven.lines(folder, "events")
    wait_for(lambda: driven.lines(folder, "events") != before or not process.is_alive())
    time.sleep(random.uniform(0.0, 0.5))
    kill(process)
    driven.resume(folder)
    assert not differences(whole, folder)
    assert events(folder, "resume")[-1].startswith("went on from step")


def test_every_checkpoint_leads_to_the_same_end(tmp_path, unbroken):
    """Also from the last step of a stage, from the best one, and from the end itself."""
    whole = tmp_path / "whole"
    run(small(tmp_path, "whole", run={"save_every": 1, "keep": 99}))
    assert list(checkpoint.complete(whole / "checkpoints")) == [1, 2, 3, 4, 5, 6, 7]
    assert not differences(unbroken, whole)
    for step in (7, 4, 3, 1):
        for later, path in checkpoint.complete(whole / "checkpoints").items():
            if later > step:
                path.rename(tmp_path / f"away-{step}-{later}")
        driven.resume(whole)
        assert not differences(unbroken, whole), step


def test_a_resume_under_another_version_says_so_and_with_other_data_is_refused(tmp_path):
    folder = tmp_path / "run"
    train_file = driven.answers(tmp_path / "train.jsonl", 8)
    with pytest.raises(driven.CrashError):
        run(short(tmp_path, "sft", data={"train": str(train_file)}), watch=at_step(2, crash))
    lock = read_json(folder / "lock.json")
    lock["packages"]["torch"] = "1.0"
    RunFolder.open(folder).write_json("lock.json", lock)
    with pytest.raises(driven.CrashError):
        driven.resume(folder, watch=at_step(3, crash))
    assert any("packages.torch changed from 1.0 to" in note for note in events(folder, "note"))
    driven.answers(train_file, 7)
    before = driven.lines(folder)
    with pytest.raises(OpdError, match=r"cannot go on: hashes.data.train changed.*--fork"):
        driven.resume(folder)
    assert driven.lines(folder) == before


# --- interrupt -------------------------------------------------------------------------------------------------------


def test_one_interrupt_finishes_the_step_and_saves(tmp_path, unbroken):
    handler = signal.getsignal(signal.SIGINT)
    summary, folder = run(small(tmp_path), watch=at_step(3, lambda: signal.raise_signal(signal.SIGINT)))
    assert (summary["status"], summary["reason"], summary["step"]) == ("stopped", "interrupted", 3)
    assert signal.getsignal(signal.SIGINT) is handler
    assert max(checkpoint.complete(folder / "checkpoints")) == 3
    assert metrics(folder)[-1]["step"] == 3
    assert not (folder / "model").exists()
    driven.resume(folder)
    assert not differences(unbroken, folder)


def test_two_interrupts_stop_at_once(tmp_path):
    def twice():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        run(short(tmp_path, "gad", name="now"), watch=at_step(1, twice))
    summary = read_json(tmp_path / "now" / "summary.json")
    assert (summary["status"], summary["step"]) == ("stopped", 1)
    assert not checkpoint.complete(tmp_path / "now" / "checkpoints")


# --- names and forks -------------------------------------------------------------------------------------------------


def test_a_run_is_never_overwritten_and_one_that_never_began_leaves_nothing(tmp_path):
    chosen = short(tmp_path, "gad", steps=1)
    _, folder = run(chosen)
    left = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(UsageError, match="never overwritten"):
        run(chosen)
    assert left == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    bad = driven.answers(tmp_path / "some.jsonl", 3)
    with pytest.raises(UsageError, match="has no answer for"):
        run(short(tmp_path, "seqkd", name="other", teachers={"teacher": {"answers": str(bad)}}))
    assert not (tmp_path / "other").exists()


def test_two_processes_cannot_write_one_run(tmp_path):
    folder = tmp_path / "run"
    process = driven.begin(short(tmp_path, "gad", steps=10_000), folder)
    try:
        wait_for(lambda: driven.lines(folder) >= 1)
        with pytest.raises(UsageError, match="another process is writing"):
            driven.resume(folder)
        before = driven.lines(folder)
        wait_for(lambda: driven.lines(folder) > before)
        assert process.is_alive()
    finally:
        kill(process)


def test_a_folder_that_is_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match=r"holds no recipe.*start again"):
        driven.resume(tmp_path / "empty")
    with pytest.raises(UsageError, match="there is no run at"):
        driven.resume(tmp_path / "none")


def test_a_fork_begins_with_the_weights_of_a_checkpoint(tmp_path, monkeypatch, unbroken):
    runs = driven.opened(monkeypatch)
    step = min(checkpoint.complete(unbroken / "checkpoints"))
    wanted = checkpoint.load(checkpoint.complete(unbroken / "checkpoints")[step])[0]["student"]
    begun = {}

    def watch(kind, _numbers):
        if kind == "stage":
            begun.update({k: v.detach().clone() for k, v in runs[-1].student.model.module.named_parameters()})

    _, folder = run(short(tmp_path, "gad"), fork=f"{unbroken}@{step}", watch=watch)
    assert begun.keys() == wanted.keys() and all(begun[name].equal(wanted[name]) for name in wanted)
    with pytest.raises(driven.CrashError):  # and so it does after a crash before its first checkpoint
        run(short(tmp_path, "gad", name="broken"), fork=f"{unbroken}@{step}", watch=at_step(2, crash))
    driven.resume(tmp_path / "broken")
    assert not differences(folder, tmp_path / "broken")


def test_a_fork_that_cannot_be(tmp_path, unbroken):
    have = ", ".join(map(str, checkpoint.complete(unbroken / "checkpoints")))
    for spec, said in ((f"{unbroken}@99", f"no checkpoint of step 99; there are {have}"), ("nowhere@2", "no run at")):
        with pytest.raises(UsageError, match=said):
            run(short(tmp_path, "gad"), fork=spec)
    with pytest.raises(UsageError, match=r"holds another model than the recipe's: \d+ weights do not fit"):
        run(short(tmp_path, "gad", student=LORA), fork=str(unbroken))
    assert not (tmp_path / "run").exists()


# --- stages ----------------------------------------------------------------------------------------------------------


def test_what_carries_over_between_stages(tmp_path, monkeypatch):
    runs, at_stage = driven.opened(monkeypatch), []
    copy = lambda weights: {name: w.detach().clone() for name, w in weights}

    def watch(kind, _numbers):
        if kind == "stage":
            own = runs[0]
            critic, reference = own.critic.members[0], own.parts.teachers.reference
            moments = {int(s["step"]) for s in critic.optimizer.state.values()}
            at_stage.append((copy(own.student.model.module.named_parameters()), critic, moments, reference))
            assert not own.student.optimizer.state
            if reference is not None:
                now = dict(reference.module.named_parameters())
                assert all(now[name].equal(w) for name, w in at_stage[-1][0].items())

    chosen = small(tmp_path, run={"sample_rows": 99})
    _, folder = run(chosen, watch=watch)
    (_, first, none, no_reference), (second_start, second, moments, reference) = at_stage
    assert first is second and not none and moments == {3} and second.steps == 7
    assert no_reference is None and reference is not None
    end = dict(runs[0].parts.teachers.reference.module.named_parameters())
    assert all(end[name].equal(w) for name, w in second_start.items())

    mixture = Mixture([world_prompts("sort", 14)], seed=chosen.run.seed)
    asked = {}
    for row in read(folder / "samples.jsonl"):
        asked.setdefault(row["step"], set()).add(row["prompt_id"])
    assert asked == {step: {p.id for p in mixture.prompts(4 * (step - 1), 4)} for step in range(1, 8)}

    found = train.legs(chosen)
    lengths = [(leg, step, leg.stage.steps) for leg in found for step in range(leg.stage.steps)]
    rates = [row.get("lr/student") for row in metrics(folder)]
    assert rates == [None, *[train.learning_rate(*where) for where in lengths[1:]]]
    assert rates[3] == rates[1] / 2  # the warm-up of two steps begins again


def test_the_run_ends_with_the_best_inside_the_band(tmp_path, monkeypatch):
    """Scores are given here: 0.2 before, then 0.5, 0.9 with answers too long, 0.6, 0.4."""
    given = iter([(0.2, 1.0), (0.5, 1.0), (0.9, 2.0), (0.6, 1.0), (0.4, 1.0)] * 2)

    def evaluate(*_args, **_named):
        score, ratio = next(given)
        return {"eval/dev_score": score, "eval/length_ratio": ratio, "eval/prompts": 6.0}

    monkeypatch.setattr(train, "evaluate", evaluate)
    own = {"every": 1, "length_band": [0.5, 1.5]}
    stages = [{"method": "gad", "steps": 4}]
    summary, folder = run(small(tmp_path, stages=stages, eval=own, run={"save_every": 0, "keep": 1}))
    assert list(checkpoint.complete(folder / "checkpoints")) == [3, 4]
    assert summary["best"] == {"step": 3, "value": 0.6} and summary["after"]["eval/dev_score"] == 0.6
    assert summary["before"]["eval/dev_score"] == 0.2
    kept = checkpoint.load(checkpoint.complete(folder / "checkpoints")[3])[0]["student"]
    assert all(kept[name].equal(w) for name, w in driven.weights(folder).items())

    summary, folder = run(small(tmp_path, "last", stages=stages, eval={**own, "keep": "last"}))
    last = checkpoint.load(checkpoint.latest(folder / "checkpoints"))[0]["student"]
    assert all(last[name].equal(w) for name, w in driven.weights(folder).items())
    assert summary["after"]["eval/dev_score"] == 0.4 and summary["best"]["step"] == 3


def test_a_metric_that_is_not_measured_is_refused_before_training(tmp_path):
    with pytest.raises(
        UsageError, match=r"eval.metric is `pass_at_9`, which is not measured here; there are .*eval/accuracy"
    ):
        run(small(tmp_path, eval={"metric": "pass_at_9"}))
    assert not metrics(tmp_path / "run")
