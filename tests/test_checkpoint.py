"""Checkpoints: complete or absent whatever kills the process, exact, and never pickled."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from required import lacking
from torch import nn

from opd import checkpoint
from opd.checkpoint import (
    complete,
    latest,
    load,
    optimizer_tensors,
    random_tensors,
    restore_optimizer,
    restore_random,
    save,
)
from opd.errors import OpdError

FORK = multiprocessing.get_context("fork")


def content(step: int) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """A state that says in every part which step it is of, so that a mixture would show."""
    weight = torch.full((64, 33), float(step))
    return {"student": {"weight": weight, "bias": weight[0].clone()}, "critic": {"w": weight + 1}}, {"step": step}


def assert_is(path: Path, step: int) -> None:
    tensors, state = load(path)
    expected, _ = content(step)
    assert state == {"step": step}
    assert {(g, n) for g, m in tensors.items() for n in m} == {(g, n) for g, m in expected.items() for n in m}
    assert all(torch.equal(tensors[g][n], value) for g, m in expected.items() for n, value in m.items())


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    group = {
        "bf16": torch.randn(5, 7, generator=generator).bfloat16(),
        "f32": torch.tensor([0.1, -0.0, float("inf"), float("nan"), 1e-45]),
        "f64": torch.randn(3, generator=generator, dtype=torch.float64),
        "scalar": torch.tensor(3.0),
        "bytes": torch.arange(9, dtype=torch.uint8),
        "empty": torch.zeros(0, 4),
        "empty_too": torch.zeros(0, 4),
        "transposed": torch.randn(4, 6, generator=generator).t(),
        "grad": torch.randn(2, 2, generator=generator).requires_grad_(),
    }
    state = {"cursor": 12, "offsets": {"metrics": 4096}, "best": 0.1 + 0.2, "name": "é\u2028"}
    path = save(tmp_path, 50, {"student": group}, state)
    assert names(path) == ["DONE", "state.json", "student.safetensors"] and path.name == "step-000050"
    tensors, back = load(path)
    assert back == state
    for name, value in group.items():
        got = tensors["student"][name]
        assert got.dtype == value.dtype and got.shape == value.shape, name
        size = torch.uint8
        assert torch.equal(got.flatten().view(size), value.detach().contiguous().flatten().view(size)), name


def test_tied_tensors_are_saved_once_and_tied_again(tmp_path: Path) -> None:
    embedding = torch.randn(1000, 64)
    stacked = torch.randn(4, 50, 50)
    group = {"embed": embedding, "head": embedding, "layer.0": stacked[0], "layer.1": stacked[1], "row": stacked[0, 1]}
    path = save(tmp_path, 1, {"student": group}, {})
    assert (path / "student.safetensors").stat().st_size < 4 * (1000 * 64 + 2 * 2500 + 50) + 2000
    back = load(path)[0]["student"]
    assert back["embed"].data_ptr() == back["head"].data_ptr()
    assert back["layer.0"].data_ptr() != back["layer.1"].data_ptr()
    assert all(torch.equal(back[name], value) for name, value in group.items())


def test_the_newest_and_the_protected_are_kept(tmp_path: Path) -> None:
    for step in range(10, 80, 10):
        save(tmp_path, step, *content(step), keep=2, protect={30})
    assert list(complete(tmp_path)) == [30, 60, 70]
    assert names(tmp_path) == ["step-000030", "step-000060", "step-000070"]
    assert_is(tmp_path / "step-000030", 30)


def test_the_one_just_saved_is_kept_even_when_older_than_the_rest(tmp_path: Path) -> None:
    save(tmp_path, 50, *content(50), keep=1)
    path = save(tmp_path, 40, *content(40), keep=1)
    assert_is(path, 40)


def test_steps_beyond_six_digits_are_ordered_as_numbers(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save(tmp_path, step, *content(7))
    found = latest(tmp_path)
    assert found is not None and found.name == "step-1000000"


def test_nothing_there_is_none(tmp_path: Path) -> None:
    assert latest(tmp_path / "checkpoints") is None
    assert complete(tmp_path) == {}


def test_a_step_saved_again_replaces_the_old_one(tmp_path: Path) -> None:
    save(tmp_path, 5, *content(1))
    path = save(tmp_path, 5, *content(2))
    assert_is(path, 2)
    assert names(tmp_path) == ["step-000005"]


@pytest.mark.parametrize("harm", ["no DONE", "torn DONE", "short file", "missing file"])
def test_an_incomplete_checkpoint_is_ignored_and_removed_by_the_next_save(tmp_path: Path, harm: str) -> None:
    save(tmp_path, 1, *content(1))
    path = save(tmp_path, 2, *content(2))
    weights = path / "student.safetensors"
    if harm == "no DONE":
        (path / "DONE").unlink()
    elif harm == "torn DONE":
        (path / "DONE").write_bytes((path / "DONE").read_bytes()[:40])
    elif harm == "short file":
        os.truncate(weights, weights.stat().st_size - 1)
    else:
        weights.unlink()
    assert latest(tmp_path) == tmp_path / "step-000001"
    with pytest.raises(OpdError, match="not a complete checkpoint"):
        load(path)
    save(tmp_path, 3, *content(3))
    assert names(tmp_path) == ["step-000001", "step-000003"]


def test_a_flipped_bit_is_found_at_loading(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *content(1))
    weights = path / "student.safetensors"
    data = bytearray(weights.read_bytes())
    data[-7] ^= 1
    weights.write_bytes(data)
    with pytest.raises(OpdError, match=r"student\.safetensors changed since it was written"):
        load(path)


def test_strangers_in_the_folder_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "step-by-step").mkdir()
    save(tmp_path, 1, *content(1))
    assert names(tmp_path) == ["notes.txt", "step-000001", "step-by-step"]


# Killed ---------------------------------------------------------------------------------------------------------


def _die_at(folder: Path, first: int, last: int, fatal: int) -> None:
    """Child: save steps first..last, and die without clean-up at the `fatal`-th call that changes the disk."""
    calls = [0]

    def counted(real: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == fatal:
                os._exit(9)
            return real(*args, **kwargs)

        return call

    for owner, name in ((os, "fsync"), (os, "write"), (os, "rename"), (os, "replace"), (os, "mkdir"), (os, "unlink"),
                        (os, "rmdir"), (Path, "write_bytes")):  # fmt: skip
        setattr(owner, name, counted(getattr(owner, name)))
    for step in range(first, last + 1):
        save(folder, step, *content(step), keep=1)
    os._exit(0)


def _run(target: Any, *args: Any) -> int:
    child = FORK.Process(target=target, args=args)
    child.start()
    child.join(30)
    assert child.exitcode is not None
    return child.exitcode


@pytest.mark.parametrize("again", [False, True], ids=["a new step", "the same step again"])
def test_killed_at_any_call_of_a_save_there_is_always_a_whole_checkpoint(tmp_path: Path, again: bool) -> None:
    first, last = (1, 1) if again else (2, 3)  # over an existing step 1
    for fatal in range(1, 200):
        folder = tmp_path / str(fatal)
        save(folder, 1, *content(1))
        code = _run(_die_at, folder, first, last, fatal)
        found = latest(folder)
        assert found is not None, f"nothing left when killed at call {fatal}"
        step = load(found)[1]["step"]
        assert_is(found, step)
        assert step in range(1, last + 1)
        save(folder, 9, *content(9), keep=1)  # and the next save tidies up
        assert names(folder) == ["step-000009"]
        if code == 0:
            assert fatal > 15, "the child did not pass through the patched calls"
            return
    pytest.fail("the child never finished")


def _save_for_ever(folder: Path, first: int) -> None:
    step = first
    while True:
        save(folder, step, *content(step), keep=2)
        (folder.parent / "said").write_text(str(step))
        step += 1


def test_kill_9_at_random_moments_never_loses_a_finished_checkpoint(tmp_path: Path) -> None:
    dice = random.Random(17)
    folder = tmp_path / "checkpoints"
    said = tmp_path / "said"
    step = 0
    for _ in range(25):
        child = FORK.Process(target=_save_for_ever, args=(folder, step + 1))
        child.start()
        time.sleep(dice.uniform(0.005, 0.12))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        text = said.read_text() if said.exists() else ""
        found = latest(folder)
        if found is None:
            assert not text
            continue
        assert_is(found, int(found.name.removeprefix("step-").removesuffix(".old")))
        step = load(found)[1]["step"]
        assert step >= int(text or 0)
    assert step > 5


# Full disks -----------------------------------------------------------------------------------------------------


def test_a_full_disk_is_one_sentence_and_harms_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1, *content(1))
    real, left = os.fsync, [0]

    def fsync(handle: int) -> None:
        if not left[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        left[0] -= 1
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    for room in range(4):  # each file of the checkpoint in turn is the one that does not fit
        left[0] = room
        with pytest.raises(OpdError, match=r"step 2 could not be written .* disk is full .*step 1 is kept.*run\.keep"):
            save(tmp_path, 2, *content(2))
        assert names(tmp_path) == ["step-000001"]
        assert_is(tmp_path / "step-000001", 1)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        lacking("disk", "mounting a small file system needs root; the simulated full disk is tested above")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_is_really_full(small_disk: Path) -> None:
    saved = 0
    with pytest.raises(OpdError, match=r"disk is full \(0\.\d MiB free\)"):
        for step in range(1, 100):
            save(small_disk, step, *content(step), keep=100)
            saved = step
    assert saved > 2
    assert list(complete(small_disk)) == list(range(1, saved + 1))
    assert names(small_disk)[-1] == f"step-{saved:06d}"
    for step in range(1, saved + 1):
        assert_is(small_disk / f"step-{step:06d}", step)
    shutil.rmtree(small_disk / "step-000001")
    assert_is(save(small_disk, 99, *content(99), keep=100), 99)


def test_another_failure_keeps_its_name_and_leaves_nothing(tmp_path: Path) -> None:
    save(tmp_path, 1, *content(1))
    with pytest.raises(TypeError, match="no place in a JSON record"):
        save(tmp_path, 2, {}, {"what": object()})
    assert names(tmp_path) == ["step-000001"]


# Optimizers -----------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6, dtype=dtype)
        self.norm = nn.LayerNorm(6, dtype=dtype)
        self.head = nn.Linear(6, 11, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.unused = nn.Parameter(torch.zeros(3, dtype=dtype))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.norm(self.embed(tokens)))
        return out


def adamw(model: nn.Module, **options: Any) -> torch.optim.AdamW:
    decay = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() <= 1]
    return torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.1, "lr": 0.03}, {"params": plain, "weight_decay": 0.0}], lr=0.01, **options
    )


def learn(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        tokens = torch.arange(step, step + 8) % 11
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(tokens).float(), (tokens * 3) % 11).backward()
        optimizer.step()


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}, {"fused": True}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_optimizer_goes_on_exactly(tmp_path: Path, dtype: torch.dtype, options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    unbroken = Tied(dtype)
    optimizer = adamw(unbroken, **options)
    learn(unbroken, optimizer, range(5))
    flat = optimizer_tensors(optimizer, dict(unbroken.named_parameters(remove_duplicate=False)))
    assert {"embed.weight/exp_avg", "embed.weight/exp_avg_sq", "embed.weight/step", "norm.bias/step"} <= set(flat)
    assert not any(name.startswith(("unused", "head")) for name in flat)
    path = save(tmp_path, 5, {"student": unbroken.state_dict(), "student_optimizer": flat}, {})
    learn(unbroken, optimizer, range(5, 9))

    tensors, _ = load(path)
    resumed = Tied(dtype)
    resumed.load_state_dict(tensors["student"])
    second = adamw(resumed, **options)
    restore_optimizer(second, dict(resumed.named_parameters()), tensors["student_optimizer"])
    learn(resumed, second, range(5, 9))
    assert all(torch.equal(a, b) for a, b in zip(unbroken.parameters(), resumed.parameters(), strict=True))
    after = optimizer_tensors(optimizer, dict(unbroken.named_parameters()))
    again = optimizer_tensors(second, dict(resumed.named_parameters()))
    assert all(torch.equal(after[name], again[name]) and after[name].dtype == again[name].dtype for name in after)
    assert len(after) == len(again)


def test_float32_moments_of_a_bfloat16_weight_stay_float32(tmp_path: Path) -> None:
    model = Tied(torch.bfloat16)
    optimizer = adamw(model)
    moments = torch.rand(11, 6) / 3
    optimizer.state[model.embed.weight] = {"step": torch.tensor(7.0), "exp_avg": moments, "exp_avg_sq": moments * 2}
    path = save(tmp_path, 1, {"o": optimizer_tensors(optimizer, dict(model.named_parameters()))}, {})
    restore_optimizer(optimizer, dict(model.named_parameters()), load(path)[0]["o"])
    back = optimizer.state[model.embed.weight]
    assert back["exp_avg"].dtype == torch.float32 and torch.equal(back["exp_avg"], moments)
    assert back["step"].item() == 7.0


def test_state_of_another_model_is_refused_whole() -> None:
    model = Tied()
    optimizer = adamw(model)
    learn(model, optimizer, range(2))
    before = optimizer_tensors(optimizer, dict(model.named_parameters()))
    wrong = {"gone.weight/step": torch.tensor(1.0), "embed.weight/exp_avg": torch.zeros(5, 6)}
    with pytest.raises(OpdError, match=r"gone\.weight is not trained here; .*shape \(5, 6\), the parameter \(11, 6\)"):
        restore_optimizer(optimizer, dict(model.named_parameters()), wrong)
    assert optimizer_tensors(optimizer, dict(model.named_parameters())).keys() == before.keys()
    with pytest.raises(OpdError, match=r"holds 3 of 4 parameters that the model does not name"):
        optimizer_tensors(optimizer, {"norm.bias": model.norm.bias})


def test_random_state_comes_back(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {"random": random_tensors()}, {})
    expected = torch.rand(4)
    torch.manual_seed(99)
    restore_random(load(path)[0]["random"])
    assert torch.equal(torch.rand(4), expected)


def test_nothing_is_pickled(tmp_path: Path) -> None:
    path = save(tmp_path, 1, *content(1))
    for file in path.iterdir():
        data = file.read_bytes()
        assert data[:2] != b"PK" and not data.startswith(b"\x80")
        if file.suffix == ".safetensors":
            json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        else:
            json.loads(data)
    assert "pickle" not in Path(checkpoint.__file__).read_text().replace("nothing is pickled", "")
