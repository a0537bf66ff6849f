"""Runs that are killed, interrupted and starved as a machine would do it: real processes, real signals, a real disk."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1]))

import driven
from driven import differences, events, kill, run, small, wait_for
from required import lacking

from opd import checkpoint
from opd.errors import OpdError
from opd.log import read_json
from opd.recipe import dump

pytestmark = pytest.mark.services

STAGES = [
    {
        "name": "warm-up",
        "method": "seqkd",
        "critic": {"learn": True, "alone_steps": 2, "group": 2},
        "steps": 8,
        "train": {"lr": 5e-4, "betas": [0.8, 0.9], "tokens_per_micro": 64},
    },
    {"name": "gad", "method": {"name": "gad", "group": 3, "kl": "linear(0.05, 0.01, 6)"}, "steps": 8},
    {"name": "tokens", "method": {"name": "token_opd", "group": 2}, "steps": 6, "train": {"updates": 2}},
]
STUDENTS = {
    "full": {},
    "lora": {"model": "world:student", "lora": 4},
    "recomputed bfloat16 lora": {
        "model": "world:student", "lora": 4, "dtype": "bfloat16", "gradient_checkpointing": True,
    },
    "fewer layers": {"model": "world:student", "drop_layers": 1},
}  # fmt: skip


def long(parent: Path, name: str = "run", **changes: object) -> object:
    """Three stages with everything that has state: about twenty steps, a checkpoint every third."""
    own = {"stages": STAGES, "run": {"save_every": 3, "keep": 1}, "eval": {"every": 4, "length_band": [0.1, 10]}}
    return small(parent, name, **{**own, **changes})


@pytest.mark.parametrize("student", STUDENTS.values(), ids=STUDENTS)
def test_many_kills_at_random_moments(tmp_path: Path, student: dict[str, object]) -> None:
    whole = run(long(tmp_path, "whole", student=student))[1]
    folder, seed = tmp_path / "run", random.randrange(10**6)
    print(f"seed {seed}")
    dice = random.Random(seed)
    process = driven.begin(long(tmp_path, student=student), folder)
    wait_for(lambda: (folder / "recipe.yaml").exists() or not process.is_alive())
    for _ in range(12):
        time.sleep(dice.uniform(0.0, 1.5))
        kill(process)
        process, before = driven.begin(None, folder), driven.lines(folder, "events")
        wait_for(lambda p=process, n=before: driven.lines(folder, "events") != n or not p.is_alive())
    kill(process)
    driven.resume(folder)
    assert not differences(whole, folder), f"seed {seed}"


@pytest.mark.parametrize("moment", ["first", "resumed"])
def test_a_kill_in_each_write_to_the_disk(tmp_path: Path, moment: str) -> None:
    """Each fsync is a moment at which one thing is on the disk and the next is not."""
    stages = [{"method": "gad", "steps": 3}]
    whole = run(small(tmp_path, "whole", stages=stages))[1]
    for number in range(1, 40, 3):
        chosen, folder = small(tmp_path, f"run-{number}", stages=stages), tmp_path / f"run-{number}"
        if moment == "resumed":
            with pytest.raises(driven.CrashError):
                run(chosen, watch=driven.at_step(2, driven.crash))
        process = driven.begin(chosen if moment == "first" else None, folder, _Die(number))
        process.join()
        if (folder / "recipe.yaml").exists():
            driven.resume(folder)
        else:
            assert moment == "first" and number < 10
            continue
        assert not differences(whole, folder), number


class _Die:
    """A trap: killed just before its fsync of this number."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> None:
        sync, count = os.fsync, [0]

        def fsync(handle: int) -> None:
            count[0] += 1
            if count[0] == self.number:
                os.kill(os.getpid(), signal.SIGKILL)
            sync(handle)

        os.fsync = fsync


# --- the command line ------------------------------------------------------------------------------------------------


def opd(*arguments: object, **how: object) -> subprocess.Popen[str]:
    start = "from opd.cli import main; main()"
    command = [sys.executable, "-c", start, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **how)  # type: ignore[call-overload, no-any-return]


def begun(tmp_path: Path, **changes: object) -> tuple[subprocess.Popen[str], Path]:
    """A run of very many steps, some of which have been made."""
    stages = [{"method": "gad", "steps": 100_000}]
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(dump(long(tmp_path, stages=stages, **changes)))
    process = opd("train", path)
    wait_for(lambda: driven.lines(folder) > 3 or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process, folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_once(tmp_path: Path, number: int) -> None:
    process, folder = begun(tmp_path)
    process.send_signal(number)
    said, wrong = process.communicate(timeout=120)
    summary = read_json(folder / "summary.json")
    assert (process.returncode, summary["status"], summary["reason"]) == (130, "stopped", "interrupted"), wrong
    assert max(checkpoint.complete(folder / "checkpoints")) == summary["step"]
    assert said.splitlines()[-1] == f"next: opd train --resume {folder}"
    again = opd("train", "--resume", folder)
    wait_for(lambda: driven.lines(folder) > summary["step"] + 3 or again.poll() is not None)
    assert again.poll() is None
    again.kill()
    again.communicate()


def test_two_signals_stop_at_once(tmp_path: Path) -> None:
    """In the middle of a step that would take a minute: the reward sleeps."""
    (tmp_path / "slow.py").write_text(
        "import time\ndef slow(prompt, text):\n    time.sleep(60)\n    return len(text)\n"
    )
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    own = {"stages": [{"method": "grpo", "steps": 3}], "reward": {"use": f"{tmp_path}/slow.py:slow"}}
    path.write_text(dump(small(tmp_path, **own, eval={"at_start": False, "length_band": None})))
    process = opd("train", path)
    wait_for(lambda: events(folder, "stage"))
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    time.sleep(1)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=20)
    assert process.returncode == 130 and said[1].startswith("interrupted: the run stopped at once"), said
    assert read_json(folder / "summary.json")["status"] == "stopped"


def test_of_two_resumes_at_the_same_time_one_runs(tmp_path: Path) -> None:
    process, folder = begun(tmp_path)
    process.kill()
    process.communicate()
    both = [opd("train", "--resume", folder, "--json") for _ in range(2)]
    wait_for(lambda: any(p.poll() is not None for p in both))
    lost, other = sorted(both, key=lambda p: p.poll() is None)
    assert lost.returncode == 2 and f"another process is writing {folder}" in lost.communicate()[1]
    before = driven.lines(folder)
    wait_for(lambda: driven.lines(folder) > before + 2)
    other.send_signal(signal.SIGINT)
    assert json.loads(other.communicate(timeout=120)[0])["reason"] == "interrupted"


def test_a_reader_that_stops_reading_is_no_traceback(tmp_path: Path) -> None:
    folder = run(small(tmp_path, stages=[{"method": "gad", "steps": 1}], run={"sample_rows": 99}))[1]
    process = opd("samples", folder, "--json")
    process.stdout.close()
    process.stdout = None
    assert "Traceback" not in process.communicate(timeout=60)[1]


# --- a full disk -----------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> object:
    """A small disk, and how to change its size."""
    place = tmp_path / "disk"
    place.mkdir()

    def size(mebibytes: int, *how: str) -> bool:
        options = ",".join([*how, f"size={mebibytes}m"])
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(place)], capture_output=True)
        return done.returncode == 0

    if not size(64):
        lacking("disk", "mounting a small disk needs root")
    yield place, lambda mebibytes: size(mebibytes, "remount")
    subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("kibibytes", [0, 3, 40, 300, 900])
def test_a_disk_that_fills_up(tmp_path: Path, disk: tuple[Path, object], kibibytes: int) -> None:
    """With so much room left after the fourth step: for nothing, for a line or two, for a part of a checkpoint."""
    place, resize = disk
    whole = run(long(tmp_path, "whole"))[1]

    def fill() -> None:
        free = os.statvfs(place)
        (place / "ballast").write_bytes(bytes(free.f_bavail * free.f_frsize - kibibytes * 1024))

    with pytest.raises(OpdError, match=r"the disk is full \(\d+\.\d MiB free\)\..*is kept|are kept"):
        run(long(place), watch=driven.at_step(4, fill))
    folder = place / "run"
    assert checkpoint.complete(folder / "checkpoints")
    assert not list(folder.rglob("*.tmp"))
    assert resize(256)
    driven.resume(folder)
    assert not differences(whole, folder)
