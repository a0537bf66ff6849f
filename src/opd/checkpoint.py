"""Checkpoints: safetensors and JSON, complete or absent.

    checkpoints/step-000050/
        student.safetensors  student_optimizer.safetensors  ...   one file a group of tensors
        state.json                                                everything else
        DONE                                                      size and sha256 of each file; written last

A checkpoint is built beside its place and renamed into it, so a killed process leaves either the whole of it or a
leftover that the next save removes. A checkpoint being replaced is first set aside as step-000050.old, which still
counts, so there is no moment without one. Tied tensors are saved once; nothing is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd.errors import OpdError
from opd.lock import hash_file
from opd.log import full_disk, json_line, read_json, replace_file, sync_folder

if TYPE_CHECKING:
    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

Groups = Mapping[str, Mapping[str, "Tensor"]]
_LIKE_WEIGHT = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer")  # moments of the weight's own shape
_PLACE = re.compile(r"step-(\d{6,})(\.old)?")
_LEFTOVER = re.compile(r"step-\d{6,}(\.old)?(\.tmp)?")


def save(
    folder: Path,
    step: int,
    tensors: Groups,
    state: Mapping[str, Any],
    keep: int = 2,
    protect: Collection[int] = (),
) -> Path:
    """Write a checkpoint of `step` below `folder` (the run's `checkpoints`), then drop old ones.

    `tensors` are named groups of named tensors of any device; `state` is JSON. Of the complete checkpoints the newest
    `keep` stay, and those of the steps in `protect` (the best one). Returns the checkpoint's folder.
    Raises OpdError when the disk is full: then this checkpoint is absent and the earlier ones are untouched.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(folder)
    place = folder / f"step-{step:06d}"
    half = place.with_name(place.name + ".tmp")
    earlier = complete(folder)
    kept = f"The checkpoint of step {max(earlier)} is kept" if earlier else "There is no earlier checkpoint"
    with full_disk(f"the checkpoint of step {step} could not be written to {folder}", kept, folder):
        try:
            half.mkdir()
            _write(half, step, tensors, state)
            _install(half, place)
        except BaseException:
            shutil.rmtree(half, ignore_errors=True)
            raise
    _prune(folder, keep, {*protect, step})
    return place


def complete(folder: Path) -> dict[int, Path]:
    """The checkpoints that can be loaded, by step, in order. Anything half-written is not among them."""
    found: dict[int, Path] = {}
    for path in sorted(folder.iterdir(), reverse=True) if folder.is_dir() else []:  # x.old before x, so that x wins
        match = _PLACE.fullmatch(path.name)
        if match and _is_complete(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, or None."""
    found = complete(folder)
    return found[max(found)] if found else None


def load(path: Path) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    """The groups (on the CPU; tied names share one tensor again) and the state of a checkpoint.

    Raises OpdError when it is incomplete or when a file's content is not what was written.
    """
    from safetensors import safe_open

    if not _is_complete(path):
        raise OpdError(f"{path} is not a complete checkpoint: DONE is missing or does not match its files")
    files: dict[str, dict[str, Any]] = read_json(path / "DONE")["files"]
    damaged = [name for name, expected in files.items() if hash_file(path / name) != expected["sha256"]]
    if damaged:
        raise OpdError(
            f"{path}: {', '.join(damaged)} changed since it was written (sha256 differs from DONE), so the state "
            "would not be the run's; resume from another checkpoint in the same folder"
        )
    groups: dict[str, dict[str, Tensor]] = {}
    for name in files:
        if not name.endswith(".safetensors"):
            continue
        with safe_open(path / name, framework="pt") as file:
            group = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            tied = json.loads((file.metadata() or {}).get("tied", "{}"))
        groups[name.removesuffix(".safetensors")] = group | {alias: group[owner] for alias, owner in tied.items()}
    return groups, read_json(path / "state.json")


# Optimizers and random state ------------------------------------------------------------------------------------


def optimizer_tensors(optimizer: Optimizer, names: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """An optimizer's state as a flat group: {"model.norm.weight/exp_avg": ..., "model.norm.weight/step": ...}.

    `names` is dict(model.named_parameters()). State is by parameter, so the division into parameter groups may
    change. Learning rate, betas and decay are not state: they follow from the recipe and the step.
    """
    import torch

    flat: dict[str, Tensor] = {}
    for parameter, name in _owned(optimizer, names).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if value is not None:
                flat[f"{name}/{key}"] = value if torch.is_tensor(value) else torch.tensor(value, dtype=torch.float64)
    return flat


def restore_optimizer(optimizer: Optimizer, names: Mapping[str, Parameter], flat: Mapping[str, Tensor]) -> None:
    """Put back what `optimizer_tensors` took, each tensor in its own type (a bfloat16 weight keeps float32 moments).

    Raises OpdError, with every mismatch at once and before anything is changed, when names or shapes differ.
    """
    owned = _owned(optimizer, names)
    by_name = {name: parameter for parameter, name in owned.items()}
    states: dict[str, dict[str, Tensor]] = {}
    problems = []
    for entry, value in flat.items():
        name, _, key = entry.rpartition("/")
        if name not in by_name:
            problems.append(f"{name} is not trained here")
        elif key in _LIKE_WEIGHT and value.shape != by_name[name].shape:
            problems.append(f"{entry} has shape {tuple(value.shape)}, the parameter {tuple(by_name[name].shape)}")
        states.setdefault(name, {})[key] = value
    if problems:
        raise OpdError(f"the optimizer's state is of another model: {'; '.join(dict.fromkeys(problems))}")
    on_device = {
        parameter for group in optimizer.param_groups for parameter in group["params"]
        if group.get("fused") or group.get("capturable")
    }  # fmt: skip
    optimizer.state.clear()
    for name, state in states.items():  # not load_state_dict: it would cast the moments to the weight's type
        parameter = by_name[name]
        optimizer.state[parameter] = {
            key: value.clone()
            if key == "step" and parameter not in on_device
            else value.to(parameter.device, copy=True)
            for key, value in state.items()
        }


def _owned(optimizer: Optimizer, names: Mapping[str, Parameter]) -> dict[Parameter, str]:
    """The optimizer's parameters with their names; a tied parameter goes by its first name."""
    name_of: dict[Parameter, str] = {}
    for name, parameter in names.items():
        name_of.setdefault(parameter, name)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    unnamed = sum(parameter not in name_of for parameter in parameters)
    if unnamed:
        raise OpdError(f"the optimizer holds {unnamed} of {len(parameters)} parameters that the model does not name")
    return {parameter: name_of[parameter] for parameter in parameters}


def random_tensors() -> dict[str, Tensor]:
    """Torch's own generators as a group. opd draws by counter; this is for what a user's model or reward may draw."""
    import torch

    devices = {f"cuda:{i}": torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
    return {"cpu": torch.get_rng_state(), **devices}


def restore_random(group: Mapping[str, Tensor]) -> None:
    """Put back what `random_tensors` took; devices that this machine lacks are passed over."""
    import torch

    torch.set_rng_state(group["cpu"])
    for index in range(torch.cuda.device_count()):
        if f"cuda:{index}" in group:
            torch.cuda.set_rng_state(group[f"cuda:{index}"], index)


# Files ------------------------------------------------------------------------------------------------------------


def _write(half: Path, step: int, tensors: Groups, state: Mapping[str, Any]) -> None:
    from safetensors.torch import save_file

    for group, members in tensors.items():
        owned, tied = _untie(members)
        save_file(owned, half / f"{group}.safetensors", metadata={"format": "pt", "tied": json.dumps(tied)})
    (half / "state.json").write_bytes(json_line(state))
    files = {path.name: _seal(path) for path in sorted(half.iterdir())}
    replace_file(half / "DONE", json_line({"step": step, "files": files}))


def _untie(members: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(name -> CPU tensor with memory of its own, alias -> the name that holds the same tensor)."""
    owned: dict[str, Tensor] = {}
    tied: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    storages: set[int] = set()
    for name, tensor in members.items():
        value = tensor.detach()
        key = (value.device, value.data_ptr(), value.dtype, tuple(value.shape), value.stride())
        if value.numel() and key in first:
            tied[name] = first[key]
            continue
        first[key] = name
        value = value.cpu().contiguous()
        storage = value.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != value.nbytes:  # a view: safetensors wants whole ones
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        owned[name] = value
    return owned, tied


def _seal(path: Path) -> dict[str, Any]:
    """Force a written file to the disk and say what it holds."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": os.fstat(file.fileno()).st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _install(half: Path, place: Path) -> None:
    """Give a finished checkpoint its name; one of the same step steps aside first and goes last."""
    aside = place.with_name(place.name + ".old")
    if place.exists():
        shutil.rmtree(aside, ignore_errors=True)
        place.rename(aside)
    half.rename(place)
    sync_folder(place.parent)
    if aside.exists():
        shutil.rmtree(aside)


def _is_complete(path: Path) -> bool:
    """DONE is there and every file has the size it says; contents are checked by `load`."""
    try:
        files = json.loads((path / "DONE").read_bytes())["files"]
        return all((path / name).stat().st_size == expected["bytes"] for name, expected in files.items())
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _remove_leftovers(folder: Path) -> None:
    valid = set(complete(folder).values())
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name) and path not in valid:
            shutil.rmtree(path)


def _prune(folder: Path, keep: int, protect: Collection[int]) -> None:
    found = complete(folder)
    newest = sorted(found)[-max(keep, 1) :]
    for step, path in found.items():
        if step not in newest and step not in protect:
            shutil.rmtree(path)  # cut short, it lacks a file that DONE names, and the next save takes the rest
