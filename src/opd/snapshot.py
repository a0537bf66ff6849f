"""The student at the ends of stages: files that later stages begin with, and that teachers are made of."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from opd.errors import OpdError, UsageError
from opd.log import full_disk
from opd.model import STUDENT, CausalModel, trained

INITIAL = "initial"  # the student before the first step


def place(folder: Path, stage: str) -> Path:
    """Where the student at the end of a stage lies in a run's folder, whatever characters its name is made of."""
    readable = re.sub(r"[^A-Za-z0-9_-]", "_", stage)[:40]
    return folder / "stages" / f"{readable}-{hashlib.blake2b(stage.encode(), digest_size=4).hexdigest()}.safetensors"


def keep(student: CausalModel, path: Path) -> None:
    """Write what learns of the student. The file is whole or absent; `OpdError` where the disk is full."""
    weights = {name: p.detach().cpu().contiguous() for name, p in trained(student.module)}
    half = path.with_suffix(".tmp")
    with full_disk(f"{path} could not be written", "The checkpoints are kept", path.parent.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(weights, half)
        half.replace(path)


def return_to(student: CausalModel, path: Path) -> None:
    """The student's weights as they were then."""
    load_weights(student.module, _read(path), str(path))


def frozen(student: CausalModel, path: Path, role: str) -> CausalModel:
    """A judge: the student as it was then. Under LoRA an adapter on the same base."""
    model = student.frozen_copy(role)
    weights = _read(path)
    if model.adapter is not None:
        weights = {name.replace(f".{STUDENT}.", f".{model.adapter}."): w for name, w in weights.items()}
    load_weights(model.module, weights, str(path), whole=False)
    return model


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise OpdError(f"{path} is not there: the stage whose student it holds has not ended in this run")
    weights: dict[str, Tensor] = load_file(path)
    return weights


def load_weights(module: nn.Module, weights: Mapping[str, Tensor], place: str, whole: bool = True) -> None:
    """Copy weights by name into a module; with `whole`, all that learns in it must be among them.

    Raises `UsageError`, before anything is changed, for names or shapes that are not the module's.
    """
    own = dict(module.named_parameters())
    lacking = [name for name, _ in trained(module) if name not in weights] if whole else []
    strange = [name for name in weights if name not in own]
    shapes = [
        f"{name} is {tuple(w.shape)} there and {tuple(own[name].shape)} here"
        for name, w in weights.items()
        if name in own and own[name].shape != w.shape
    ]
    if lacking or strange or shapes:
        first = (shapes or [f"{(strange or lacking)[0]} is only {'there' if strange else 'here'}"])[0]
        raise UsageError(
            f"{place} holds another model than the recipe's: {len(lacking) + len(strange) + len(shapes)} weights do "
            f"not fit; {first}. Use the same student.model, student.lora and student.drop_layers"
        )
    with torch.no_grad():
        for name, weight in weights.items():
            own[name].copy_(weight)


def move_mean(mean: CausalModel, student: CausalModel, decay: float) -> None:
    """One step of a running mean of the student's weights: mean = decay mean + (1 - decay) student.

    Of an adapter its two matrices are averaged, each by itself.
    """
    own = dict(mean.module.named_parameters())
    with torch.no_grad():
        for name, p in trained(student.module):
            there = name if mean.adapter is None else name.replace(f".{STUDENT}.", f".{mean.adapter}.")
            own[there].lerp_(p.to(own[there]), 1 - decay)
