"""Teachers' models by role: loaded when they are first asked, kept, or let go before the next of their kind comes."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from opd.head import Head
from opd.log import full_disk
from opd.model import CausalModel, parameters

Load = Callable[[], CausalModel]


class Cast(Mapping[str, CausalModel]):
    """Models by role. Those that are not `kept` come one at a time: loading one lets go of the one before."""

    def __init__(self, loads: Mapping[str, Load], kept: frozenset[str]) -> None:
        self._loads, self.kept = dict(loads), kept
        self._here: dict[str, CausalModel] = {}
        self._sizes: dict[str, int] = {}

    @classmethod
    def of(cls, models: Mapping[str, CausalModel]) -> Cast:
        """Models that are loaded already."""
        if isinstance(models, Cast):
            return models
        return cls({role: partial(models.__getitem__, role) for role in models}, frozenset(models))

    def __getitem__(self, role: str) -> CausalModel:
        if role not in self._here:
            load = self._loads[role]
            if role not in self.kept:
                for guest in [r for r in self._here if r not in self.kept]:
                    del self._here[guest]
            self._here[role] = load()
            self._sizes[role] = parameters(self._here[role])
        return self._here[role]

    def __contains__(self, role: object) -> bool:  # a mapping's own would load the model to find out
        return role in self._loads

    def __iter__(self) -> Iterator[str]:
        return iter(self._loads)

    def __len__(self) -> int:
        return len(self._loads)

    @property
    def here(self) -> tuple[str, ...]:
        """The roles whose models are in memory now."""
        return tuple(self._here)

    def size(self, role: str) -> int:
        """Parameters that work on each token; of a model that has left, as it was when it was here."""
        if role not in self._sizes:
            self[role]
        return self._sizes[role]


def carried(x: Tensor, folder: Path | None) -> Tensor:
    """A tensor kept in a file that is mapped into memory and has no name, so that it is gone with the tensor.

    None keeps it where it is. A file on disk is read back page by page as it is needed.
    """
    if folder is None:
        return x
    if not x.numel():
        return x.cpu()
    with full_disk(f"hidden states could not be written to {folder}", "The checkpoints are kept", folder.parent):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            _make_room(file.fileno(), x.numel() * x.element_size())
            mapped = torch.from_file(file.name, shared=True, size=x.numel(), dtype=x.dtype)
    return mapped.view(x.shape).copy_(x)


def _make_room(file: int, size: int) -> None:
    """Take the bytes now: writing to a mapped file on a full disk would kill the process without a word."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file, 0, size)
    else:
        os.ftruncate(file, size)


def carried_head(head: Head, folder: Path | None) -> Head:
    """A head that outlives its model: its weights copied off the device."""
    copy: Callable[[Tensor], Tensor] = lambda w: carried(w.detach().to("cpu", copy=folder is None), folder)
    return replace(head, weight=copy(head.weight), bias=None if head.bias is None else copy(head.bias))
