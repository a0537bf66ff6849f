"""Is this run learning, and if not, why: made runs for every answer and every cause, and real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from made_runs import bare_run, curved_run, good_run, hostile_run

import opd
from opd.report import judged, render
from opd.report.run import load
from opd.report.verdict import CAUSES, course

# --- where it goes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "evals", "steps", "curves"),
    [
        ("learning", (0.4, 0.5, 0.6), 100, {}),
        ("learning", (), 100, {"kl__reverse_nats": (0.5, 0.1), "overlap__ratio": (0.72, 0.91)}),
        ("learning", (), 100, {"reward__mean": (0.2, 0.6)}),
        ("learning slowly", (0.4, 0.42), 100, {"kl__reverse_nats": (0.5, 0.3)}),  # nearer, and the evaluation says 0
        ("learning slowly", (), 100, {"kl__reverse_nats": (0.5, 0.46)}),  # by less than a tenth
        ("not learning", (0.4, 0.41), 100, {"kl__reverse_nats": 0.5}),
        ("not learning", (), 100, {"reward__mean": 0.3}),
        ("going backwards", (0.6, 0.5, 0.4), 100, {"kl__reverse_nats": (0.5, 0.2)}),
        ("going backwards", (0.4, 0.7, 0.55), 100, {}),  # above its start, and far below its best
        ("going backwards", (), 100, {"kl__reverse_nats": (0.3, 0.9)}),
        ("going backwards", (), 100, {"reward__mean": (0.5, 0.2)}),
        ("cannot tell yet", (), 5, {"kl__reverse_nats": (0.5, 0.1)}),  # too few points for a direction
        ("cannot tell yet", (), 20, {"kl__reverse_nats": 0.5}),
        ("cannot tell yet", (0.4,), 100, {}),
        ("cannot tell yet", (0.4, 0.42), 100, {}),
    ],
)
def test_the_answer(tmp_path: Path, answer: str, evals: tuple[float, ...], steps: int, curves: dict[str, Any]) -> None:
    found = judged(curved_run(tmp_path, "r", steps, *evals, **curves))
    assert found.answer == answer, found.line
    assert found.line.startswith(f"{answer}: ") and found.evidence and "\n" not in found.line
    assert (answer == "learning") == (not found.remedy)


def test_the_evidence_is_the_numbers_and_their_steps(tmp_path: Path) -> None:
    run = curved_run(tmp_path, "r", 100, 0.4, 0.6, kl__reverse_nats=(0.5, 0.1), overlap__ratio=(0.7, 0.9))
    line = judged(run).line
    assert "accuracy 40 % → 60 % (steps 0 → 100)" in line
    assert "(steps 1–20 → 81–100)" in line and "overlap of likely tokens 7" in line
    found = course(load(run), "kl/reverse_nats")
    assert found is not None and found.sure
    assert found.first == pytest.approx(0.46, abs=0.01) and found.last == pytest.approx(0.14, abs=0.01)


def test_chance_is_no_direction(tmp_path: Path) -> None:
    """A curve of noise alone is sure of nothing, whatever its seed; one with a trend of the noise's size is."""
    for seed in range(30):
        run = load(curved_run(tmp_path, f"n{seed}", 60, reward__mean=0.5))
        found = course(run, "reward/mean")
        assert found is not None and not found.sure
    trend = course(load(curved_run(tmp_path, "t", 60, reward__mean=(0.5, 0.52))), "reward/mean")
    assert trend is not None and trend.sure


def test_only_the_last_stage_is_read(tmp_path: Path) -> None:
    run = curved_run(tmp_path, "r", 100, kl__reverse_nats=(0.9, 0.1))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines[60:]:
        line |= {"stage": "two", "kl/reverse_nats": 0.3 + line["step"] / 200}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = judged(run)
    assert found.answer == "going backwards" and "(steps 61–68 → 93–100)" in found.line


# --- why --------------------------------------------------------------------------------------------------------------

WHY: list[tuple[str, dict[str, Any]]] = [
    ("other probabilities", {"mismatch__outside_share": 0.1}),
    ("all answers earn the same", {"group__degenerate_share": 0.95}),
    ("nothing to learn from", {"grad__empty_steps": 4.0}),
    ("repeat themselves", {"text__repeating_share": (0.0, 0.3), "length__student_tokens": (50.0, 120.0)}),
    ("until they are cut", {"length__truncated_share": (0.1, 0.6), "length__student_tokens": (50.0, 120.0)}),
    ("moves away from the teacher", {"kl__reverse_nats": (0.3, 0.9)}),
    ("has collapsed", {"entropy__student_nats": (1.0, 0.01)}),
    ("flattens", {"entropy__student_nats": (0.5, 3.0)}),
    ("clip stops most", {"clip__positive_stopped_share": 0.8}),
    ("lets almost nothing through", {"gate__push_teacher_band_open_share": 0.001}),
    ("do not agree", {"overlap__ratio": (0.52, 0.54)}),
    ("cannot tell teacher from student", {"critic__accuracy": 0.5}),
    ("knows the student at once", {"critic__accuracy": 0.99}),
    ("what it alone was shown", {"leak__certain_share": 0.12}),
    ("the evaluation does not follow", {"kl__reverse_nats": (0.5, 0.1), "overlap__ratio": (0.72, 0.91)}),
    ("nearly the same already", {"kl__reverse_nats": 0.01, "overlap__ratio": 0.97}),
]


@pytest.mark.parametrize(("words", "curves"), WHY, ids=[words for words, _ in WHY])
def test_the_cause_and_its_remedy(tmp_path: Path, words: str, curves: dict[str, Any]) -> None:
    found = judged(curved_run(tmp_path, "r", 100, 0.6, 0.4, **curves))
    cause = next(c for c in CAUSES if words in c.why)
    assert found.answer == "going backwards" and found.why == cause.why and found.remedy == cause.remedy
    assert found.line.endswith(cause.remedy)
    shown = " ".join(found.evidence)
    assert all(any(part in shown for part in (sign.key, "(steps")) for sign in cause.signs)


def test_every_cause_has_a_made_run() -> None:
    assert [sum(words in cause.why for words, _ in WHY) for cause in CAUSES] == [1] * len(CAUSES)


def test_a_run_that_learns_is_not_blamed(tmp_path: Path) -> None:
    found = judged(curved_run(tmp_path, "r", 100, 0.4, 0.6, mismatch__outside_share=0.1, group__degenerate_share=0.95))
    assert found.answer == "learning" and not found.why


def test_a_collapse_says_why_it_was_stopped(tmp_path: Path) -> None:
    found = judged(curved_run(tmp_path, "r", 40, 0.4, 0.45, reason="collapse, by two signs. Lower train.lr"))
    assert found.answer == "going backwards" and "collapse, by two signs" in found.why


@pytest.mark.parametrize("make", [bare_run, hostile_run])
def test_any_folder_has_a_verdict(tmp_path: Path, make: Any) -> None:
    assert judged(make(tmp_path)).answer in ("cannot tell yet", "not learning", "learning", "going backwards")


def test_it_stands_at_the_top_of_the_report(tmp_path: Path) -> None:
    run = good_run(tmp_path, steps=120)
    found = judged(run)
    assert found.answer == "learning"
    html = render([run], tmp_path / "r.html").read_text()
    assert html.index("learning</b>") < html.index('id="health"')
    for part in ("KL by place in the answer", "Overlap by place in the answer", "steps 1 to 30", "steps 91 to 120",
                 "Teacher and student", "Trust and gates", "Open: match_teacher", "Sampler and trainer"):  # fmt: skip
        assert part in html, part
    assert "position/" not in html
    other = curved_run(tmp_path, "bad", 100, 0.6, 0.4, overlap__ratio=0.5)
    both = render([run, other], tmp_path / "both.html").read_text()
    assert "do not agree on which tokens" in both and "the last quarter of each" in both


# --- real runs --------------------------------------------------------------------------------------------------------

RECIPE = {
    "student": {"model": "world:student"},
    "teachers": {"teacher": {"model": "world:teacher"}},
    "data": {"train": ["world:sort:256"], "dev": [{"path": "world:sort:60", "split": "dev"}]},
    "reward": "task",
    "method": {"name": "gkd", "on_policy": 1.0, "divergence": "reverse_kl"},
    "speak": {"max_tokens": 14, "batch_rows": 256},
    "train": {"lr": 1e-3, "prompts": 32, "steps": 40},
    "eval": {"every": 20, "collapse": None, "keep": "last"},
    "run": {"threads": 1, "save_every": 0, "name": "one"},
}


def ran(folder: Path, **sections: Any) -> opd.Run:
    data = {**RECIPE, **{k: {**RECIPE[k], **v} for k, v in sections.items()}}
    return opd.run(opd.load({**data, "run": {**data["run"], "dir": str(folder)}}))


def test_a_real_run_that_learns(tmp_path: Path) -> None:
    run = ran(tmp_path)
    assert run.verdict.answer == "learning", run.verdict.line
    stats = next(line for line in run.metrics() if "loss/total" in line)
    assert {"overlap/ratio", "entropy/gap_nats", "position/kl_nats_from_1", "mismatch/outside_share"} <= stats.keys()
    assert stats["mismatch/nats_max"] < 1e-2 and stats["text/refusal_share"] == 0.0


def test_a_real_run_with_a_rate_a_hundred_times_too_high(tmp_path: Path) -> None:
    found = ran(tmp_path, train={"lr": 1e-1}).verdict
    assert found.answer == "going backwards" and "train.lr" in found.remedy, found.line
