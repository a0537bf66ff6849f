"""The record of a run: deterministic bytes, torn lines, full disks, rewinding, and never two writers."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from opd import log
from opd.errors import OpdError, UsageError
from opd.lock import differences, hash_model, lock
from opd.log import RunFolder, json_line, read


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "runs", method="gad")


def fill(monkeypatch: pytest.MonkeyPatch, room: int, error: int = errno.ENOSPC) -> None:
    """From now on the disk takes `room` more bytes: a short write first, then the error, as the kernel does it."""
    real, left = os.write, [room]

    def write(handle: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(error, os.strerror(error))
        part = bytes(data)[: left[0]]
        left[0] -= len(part)
        return real(handle, part)

    monkeypatch.setattr(log.os, "write", write)


def test_names_are_readable_and_never_reused(tmp_path: Path) -> None:
    names = [RunFolder.create(tmp_path, method="./mine.py:brevity").name for _ in range(3)]
    assert [name[-3:] for name in names] == ["-01", "-02", "-03"]
    assert all(name.startswith("mine.py-brevity-20") for name in names)


def test_a_named_run_is_refused_when_it_exists_with_three_offers(tmp_path: Path) -> None:
    RunFolder.create(tmp_path, "mine").metrics({"step": 1})
    with pytest.raises(UsageError, match=r"--resume .*mine.*--fork .*@STEP.*another run.name"):
        RunFolder.create(tmp_path, "mine")
    assert read(tmp_path / "mine" / "metrics.jsonl") == [{"step": 1}]


@pytest.mark.parametrize("name", ["../up", "a/b", ".hidden", "x\n"])
def test_a_name_that_leaves_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="plain folder name"):
        RunFolder.create(tmp_path / "runs", name)
    assert list((tmp_path / "runs").iterdir()) == []


def test_opening_what_is_not_there_names_what_is(run: RunFolder) -> None:
    with pytest.raises(UsageError, match=rf"no run at .*nope; .* has {run.name}"):
        RunFolder.open(run.path.parent / "nope")


def test_metrics_bytes_do_not_depend_on_key_order_or_number_type(tmp_path: Path) -> None:
    first, second = RunFolder.create(tmp_path), RunFolder.create(tmp_path)
    first.metrics({"loss/total": 0.1, "step": 3, "stage": "gad", "critic/accuracy": 1 / 3})
    second.metrics({"critic/accuracy": np.float64(1 / 3), "stage": "gad", "step": np.int64(3), "loss/total": 0.1})
    expected = b'{"step":3,"stage":"gad","critic/accuracy":0.3333333333333333,"loss/total":0.1}\n'
    assert (first.path / "metrics.jsonl").read_bytes() == (second.path / "metrics.jsonl").read_bytes() == expected


@given(st.floats())
def test_floats_come_back_exactly_and_what_is_not_a_number_is_null(value: float) -> None:
    back = json.loads(json_line({"x": value, "in": [value]}))
    assert back["x"] == back["in"][0] == (value if math.isfinite(value) else None)


@given(st.text())
def test_any_text_is_one_line_and_comes_back(text: str) -> None:
    line = json_line({"text": text})
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert json.loads(line)["text"] == text


def test_a_lone_surrogate_is_written_and_comes_back() -> None:
    assert json.loads(json_line({"text": "a\ud800b"}))["text"] == "a\ud800b"


def test_a_metric_that_is_not_finite_stops_the_run_and_writes_nothing(run: RunFolder) -> None:
    run.metrics({"step": 1, "loss/total": 0.5})
    with pytest.raises(OpdError, match=r"step 2: grad/norm is inf, loss/total is nan\. .*train\.lr"):
        run.metrics({"step": 2, "loss/total": float("nan"), "grad/norm": float("inf"), "kl/reverse_nats": 0.1})
    assert [row["step"] for row in read(run.path / "metrics.jsonl")] == [1]


def test_elsewhere_not_finite_is_null(run: RunFolder) -> None:
    run.perf({"step": 1, "time/step_s": float("nan")})
    run.sample({"step": 1, "kl_per_token": [0.1, float("inf")]})
    assert read(run.path / "perf.jsonl") == [{"step": 1, "time/step_s": None}]
    assert read(run.path / "samples.jsonl") == [{"step": 1, "kl_per_token": [0.1, None]}]


@pytest.mark.parametrize("torn", [b'{"step":3,"loss', b'{"step":3}', b"\x00" * 4096, b'{"step":3,"text":"\xf0\x9f'])
def test_a_torn_last_line_is_ignored_by_readers_and_cut_by_the_next_writer(run: RunFolder, torn: bytes) -> None:
    for step in (1, 2):
        run.metrics({"step": step})
    run.close()
    path = run.path / "metrics.jsonl"
    with path.open("ab") as file:
        file.write(torn)
    assert [row["step"] for row in read(path)] == [1, 2]
    RunFolder.open(run.path).metrics({"step": 3})
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n{"step":3}\n'


def test_a_torn_line_longer_than_the_search_window_is_cut(run: RunFolder) -> None:
    run.sample({"step": 1})
    run.close()
    path = run.path / "samples.jsonl"
    with path.open("ab") as file:
        file.write(b'{"text":"' + b"x" * 200_000)
    RunFolder.open(run.path).sample({"step": 2})
    assert path.read_bytes() == b'{"step":1}\n{"step":2}\n'


def test_a_broken_line_inside_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step":1}\nnonsense\n{"step":3}\n')
    with pytest.raises(OpdError, match=r"metrics\.jsonl:2: not JSON: b'nonsense'"):
        read(path)
    path.write_bytes(b'{"step":1}\n[1]\n{"step":3}\n')
    with pytest.raises(OpdError, match=r"metrics\.jsonl:2: expected one JSON object"):
        read(path)


def test_reading_what_was_never_written_is_empty(run: RunFolder) -> None:
    assert read(run.path / "metrics.jsonl") == []
    assert run.read_json("summary.json") is None


def test_rewind_makes_the_continued_file_equal_to_the_unbroken_one(tmp_path: Path) -> None:
    unbroken, broken = RunFolder.create(tmp_path), RunFolder.create(tmp_path)
    for step in range(10):
        unbroken.metrics({"step": step, "loss/total": step / 7})
    for step in range(8):
        broken.metrics({"step": step, "loss/total": step / 7})
        if step == 4:
            saved = broken.offsets()
        if step == 6:
            broken.event(6, "note", "after the checkpoint")
    broken.close()
    resumed = RunFolder.open(broken.path)
    resumed.rewind(saved)
    for step in range(5, 10):
        resumed.metrics({"step": step, "loss/total": step / 7})
    assert (broken.path / "metrics.jsonl").read_bytes() == (unbroken.path / "metrics.jsonl").read_bytes()
    assert read(broken.path / "events.jsonl") == []


def test_rewind_refuses_a_record_that_is_shorter_than_the_checkpoint_says_and_cuts_nothing(run: RunFolder) -> None:
    run.metrics({"step": 1})
    run.event(1, "note", "kept")
    with pytest.raises(OpdError, match=r"metrics\.jsonl has 11 bytes, the checkpoint was written at 99"):
        run.rewind({"events": 0, "metrics": 99})
    assert len(read(run.path / "events.jsonl")) == 1


@pytest.mark.parametrize("room", [0, 1, 20])
@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_one_sentence_and_leaves_whole_lines(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, room: int, error: int
) -> None:
    run.metrics({"step": 1, "loss/total": 0.25})
    before = (run.path / "metrics.jsonl").read_bytes()
    with monkeypatch.context() as patch:
        fill(patch, room, error)
        with pytest.raises(OpdError, match=rf"metrics\.jsonl could not grow: the disk is full .*first {len(before)} b"):
            run.metrics({"step": 2, "loss/total": 0.125})
    assert (run.path / "metrics.jsonl").read_bytes() == before
    run.metrics({"step": 2})  # room again: the run can go on
    assert [row["step"] for row in read(run.path / "metrics.jsonl")] == [1, 2]


def test_a_document_survives_a_full_disk(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.write_json("summary.json", {"status": "running"})
    with monkeypatch.context() as patch:
        fill(patch, 5)
        with pytest.raises(OpdError, match=r"summary\.json could not be written: the disk is full"):
            run.write_json("summary.json", {"status": "finished"})
    assert run.read_json("summary.json") == {"status": "running"}
    assert sorted(p.name for p in run.path.iterdir()) == [".writer", "summary.json"]


def test_another_error_is_not_called_a_full_disk(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    run.metrics({"step": 1})
    fill(monkeypatch, 0, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        run.metrics({"step": 2})


HOLD = """
import sys, time
from pathlib import Path
from opd.log import RunFolder
run = RunFolder.open(Path(sys.argv[1]))
step = 0
while True:
    run.sample({"step": step, "text": "x" * 3000})
    if step == 0:
        print("up", flush=True)
    step += 1
"""


def test_a_second_process_cannot_write_and_after_kill_9_the_run_is_free_and_readable(run: RunFolder) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(run.path)], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None and child.stdout.readline() == b"up\n"
        with pytest.raises(UsageError, match="another process is writing"):
            run.metrics({"step": 1})
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    steps = [row["step"] for row in read(run.path / "samples.jsonl")]
    assert steps == list(range(len(steps))) and steps
    run.metrics({"step": 1})
    assert read(run.path / "metrics.jsonl") == [{"step": 1}]


def test_the_lock_says_what_changed(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "model.safetensors").write_bytes(b"weights")
    (model / "config.json").write_text("{}")
    data = tmp_path / "a.jsonl"
    data.write_text("{}\n")
    left = lock(seed=17, threads=2, models={"student": model}, data=[data], template="{{ x }}")
    assert left["packages"]["opd"] and left["packages"]["torch"]
    json.dumps(left)
    elsewhere = model.rename(tmp_path / "moved")
    assert hash_model(elsewhere) == left["models"]["student"]["sha256"]
    (elsewhere / "model.safetensors").write_bytes(b"Weights")
    right = lock(seed=18, threads=2, models={"student": elsewhere}, data=[data], template="{{ x }}")
    changed = differences(left, right)
    assert set(changed) == {"seed", "models.student.path", "models.student.sha256"}
    assert changed["seed"] == (17, 18)
    assert differences({"a": {"b": 1}, "c": None}, {"c": {}}) == {"a.b": (1, None), "c": (None, {})}
    assert differences({"a": 1}, {"a": {"b": 1}}) == {"a": (1, {"b": 1})}


def test_the_record_needs_no_torch() -> None:
    code = "import sys, opd.log, opd.lock, opd.checkpoint; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
