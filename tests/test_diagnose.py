"""Collapse, told from a dip and from learning; who waits for whom; and a run that collapses and keeps its best."""

import json

import pytest

import opd
from opd.diagnose import WINDOW, Watchdog, fallen, paced, smoothed

HEALTHY = {"entropy/student_nats": 0.4, "length/ratio": 1.0, "length/truncated_share": 0.0}


def after(steps: dict[str, float], count: int = WINDOW, healthy: int = WINDOW) -> Watchdog:
    """A watchdog that saw healthy steps, and then these."""
    dog = Watchdog()
    for stats in [HEALTHY] * healthy + [{**HEALTHY, **steps}] * count:
        list(dog.look(stats))
    return dog


# --- signs in the steps -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "steps",
    [
        {},
        {"entropy/student_nats": 0.01},  # a method that sharpens
        {"length/truncated_share": 0.9},  # speak.max_tokens is too low
        {"length/ratio": 3.0},
        {"entropy/student_nats": 0.04, "length/ratio": 0.6},
    ],
)
def test_one_sign_alone_is_no_collapse(steps):
    assert after(steps).collapsed() is None


@pytest.mark.parametrize(
    ("steps", "words"),
    [
        ({"entropy/student_nats": 0.01, "length/ratio": 0.2}, ["0.20 times as long", "entropy is 0.010"]),
        ({"entropy/student_nats": 3.0, "length/truncated_share": 0.8}, ["80% of the answers do not end", "3.000"]),
    ],
)
def test_two_signs_stop_the_run_in_words(steps, words):
    said = after(steps).collapsed()
    assert said is not None and all(word in said for word in words) and "Lower train.lr" in said


def test_a_few_bad_steps_are_no_collapse():
    assert after({"entropy/student_nats": 0.001, "length/ratio": 0.1}, count=3).collapsed() is None


def test_what_is_remembered_survives_a_checkpoint():
    from dataclasses import asdict

    dog = after({"entropy/student_nats": 0.01, "length/ratio": 0.2})
    assert Watchdog(**json.loads(json.dumps(asdict(dog)))).collapsed() == dog.collapsed()


# --- a fall of the accuracy -------------------------------------------------------------------------------------------


def test_a_fall_below_half_of_the_best_is_a_collapse():
    said = fallen("eval/dev_score", 0.2, 0.6, 200, 0.5)
    assert said is not None and "0.200, less than 50% of the 0.600" in said
    assert fallen("eval/dev_score", 0.35, 0.6, 200, 0.5) is None


def test_a_fall_that_few_prompts_show_by_chance_is_none():
    assert fallen("eval/dev_score", 0.0, 0.2, 10, 0.5) is None
    assert fallen("eval/dev_score", 0.0, 0.2, 100, 0.5) is not None
    assert fallen("eval/dev_score", 0.0, 0.0, 100, 0.5) is None


# --- who waits --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("accuracy", "band", "expected"),
    [
        (None, (0.55, 0.9), (False, False)),
        (0.3, None, (False, False)),
        (0.5, (0.55, 0.9), (True, False)),
        (0.7, (0.55, 0.9), (False, False)),
        (0.95, (0.55, 0.9), (False, True)),
    ],
)
def test_below_the_band_the_student_waits_and_above_it_the_critic_rests(accuracy, band, expected):
    assert paced(accuracy, band) == expected


def test_the_accuracy_is_smoothed():
    assert smoothed(None, 0.7) == 0.7
    assert smoothed(0.5, 1.0) == pytest.approx(0.6)


def test_a_student_that_waits_for_long_is_said():
    dog = Watchdog()
    said = [m for _ in range(WINDOW) for m, _ in dog.look({"critic/student_waits": 1.0})]
    assert len(said) == 1 and "100% of the steps the student waited" in said[0]


# --- runs -------------------------------------------------------------------------------------------------------------

RECIPE = {
    "student": {"model": "world:student"},
    "teachers": {"teacher": {"model": "world:teacher"}},
    "critic": {"lr": 1e-3},
    "data": {"train": ["world:sort:64"], "dev": [{"path": "world:sort:40", "split": "dev"}]},
    "reward": "task",
    "method": {"name": "gad", "kl": 0.0, "group": 4},
    "speak": {"max_tokens": 14, "batch_rows": 256},
    "train": {"lr": 1e-4, "prompts": 8, "steps": 40},
    "eval": {"every": 4},
    "run": {"threads": 1, "save_every": 0, "name": "one"},
}


def ran(folder, **sections) -> opd.Run:
    data = {**RECIPE, **{k: {**RECIPE[k], **v} for k, v in sections.items()}}
    return opd.run(opd.load({**data, "run": {**data["run"], "dir": str(folder)}}))


def events(run: opd.Run, kind: str) -> list[str]:
    rows = map(json.loads, (run.path / "events.jsonl").read_text().splitlines())
    return [row["message"] for row in rows if row["kind"] == kind]


def test_a_learning_rate_that_is_far_too_high_stops_the_run_and_the_best_is_kept(tmp_path):
    run = ran(tmp_path, train={"lr": 5e-3})
    assert run.summary["status"] == "stopped" and run.summary["step"] < 40
    assert run.summary["reason"].startswith("collapse") and run.summary["reason"] in events(run, "stop")
    scores = {m["step"]: m["eval/dev_score"] for m in run.metrics() if m.get("event") == "eval"}
    best = run.summary["best"]["step"]
    assert scores[best] == max(v for step, v in scores.items() if step > 0) == run.after["eval/dev_score"]
    assert scores[run.summary["step"]] < 0.5 * max(scores.values())


def test_without_the_alarm_it_goes_on(tmp_path):
    train = {"lr": 5e-3, "steps": 12, "max_empty_steps": 12}
    run = ran(tmp_path, train=train, eval={"every": 6, "collapse": None, "keep": "last"})
    assert run.summary["status"] == "finished" and run.summary["step"] == 12
    assert run.after["eval/dev_score"] < 0.5 * run.before["eval/dev_score"]


def test_below_the_band_the_student_stands_still_and_above_it_the_critic(tmp_path):
    few = {"steps": 4, "prompts": 4}
    low = ran(tmp_path / "low", critic={"lr": 1e-3, "accuracy_band": [0.98, 0.99]}, train=few, eval={"every": 0})
    high = ran(tmp_path / "high", critic={"lr": 1e-3, "accuracy_band": [0.01, 0.02]}, train=few, eval={"every": 0})
    steps = lambda run: [m for m in run.metrics() if "event" not in m]
    assert [("grad/norm" in m, "critic/loss" in m) for m in steps(low)] == [(True, True)] + 3 * [(False, True)]
    assert [("grad/norm" in m, "critic/loss" in m) for m in steps(high)] == [(True, True)] + 3 * [(True, False)]
    assert all("critic/accuracy" in m for m in steps(high)), "a critic at rest is still measured"
