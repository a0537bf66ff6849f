"""The terminal view of samples: what is picked, and that no text can act on the terminal."""

from __future__ import annotations

import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
from made_runs import bare_run, good_run, hostile_run
from rich.console import Console

from opd.errors import UsageError
from opd.samples import select, show


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return good_run(tmp_path_factory.mktemp("runs"), steps=50)


def printed(run: Path, width: int = 120, **options: object) -> str:
    out = io.StringIO()
    Console(file=out, width=width, color_system=None).print(show(run, **options))  # type: ignore[arg-type]
    return out.getvalue()


def test_the_last_step_is_shown_in_recorded_order(run: Path) -> None:
    rows = select(run)
    assert {row["step"] for row in rows} == {50}
    assert [row["prompt_id"][:2] for row in rows] == ["00", "01", "02", "03", "04", "05"]
    assert len(select(run, n=2)) == 2
    assert {row["step"] for row in select(run, step=25)} == {25}


def test_worst_and_best_order_by_reward(run: Path) -> None:
    worst, best = ([row["reward"] for row in select(run, **{order: True})] for order in ("worst", "best"))
    assert worst == sorted(worst) and best == worst[::-1] and len(set(worst)) > 1


def test_without_reward_the_critic_orders_and_rows_without_either_come_last(tmp_path: Path) -> None:
    from opd.log import RunFolder

    with RunFolder.create(tmp_path, "r") as folder:
        for name, score in (("a", None), ("b", 0.1), ("c", 2.0), ("d", -1.0)):
            folder.sample({"step": 1, "text": name, "score": score, "teacher_score": 0.5})
    assert [row["text"] for row in select(tmp_path / "r", worst=True)] == ["d", "b", "c", "a"]
    assert [row["text"] for row in select(tmp_path / "r", best=True)] == ["c", "b", "d", "a"]


def test_a_prompt_is_followed_through_the_steps_by_id_or_text(run: Path) -> None:
    by_id, by_text = select(run, prompt="00c0"), select(run, prompt="SKY IS blue")
    assert by_id == by_text and [row["step"] for row in by_id] == [0, 25, 50]
    assert [row["step"] for row in select(run, prompt="00c0", step=25)] == [25]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"step": 7}, "no samples at step 7; there are at 0, 25, 50"),
        ({"prompt": "zzz"}, "no sampled prompt has an id that starts with 'zzz'"),
        ({"worst": True, "best": True}, "opposite orders"),
        ({"n": 0}, "-n 0"),
    ],
)
def test_what_does_not_fit_is_said(run: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=re.escape(message)):
        select(run, **options)  # type: ignore[arg-type]


def test_a_run_without_samples_says_why(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no samples yet"):
        select(bare_run(tmp_path))


@pytest.mark.parametrize("width", [40, 120])
def test_student_and_teacher_stand_beside_each_other(run: Path, width: int) -> None:
    text = printed(run, width, n=2, step=0)
    assert "student" in text and "teacher" in text and "critic prefers the teacher" in text
    assert "step 0 · gad · chat · 00c0ffee" in text
    assert all(len(line) <= width for line in text.splitlines())
    if width == 120:
        assert "cut at" in text and "score 0.9" in text


def test_no_sample_can_send_a_control_character_to_the_terminal(tmp_path: Path) -> None:
    text = printed(hostile_run(tmp_path), n=30)
    assert "[31mred" in text and "\N{REPLACEMENT CHARACTER}" in text
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", text)
    assert "onerror" in text
    text.encode()


def test_square_brackets_are_not_markup(tmp_path: Path) -> None:
    from opd.log import RunFolder

    with RunFolder.create(tmp_path, "r") as folder:
        folder.sample({"step": 1, "prompt": "[bold]p[/bold]", "text": "[link=x]t[/]", "teacher_text": "[/nope]"})
    text = printed(tmp_path / "r")
    assert "[bold]p[/bold]" in text and "[link=x]t[/]" in text and "[/nope]" in text


def test_samples_need_no_torch() -> None:
    code = "import sys, opd.samples; print({'torch', 'transformers', 'pydantic', 'jinja2'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
