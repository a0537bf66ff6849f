"""Pure functions on tensors: no state, no files, no models. Torch loads when one is first used, not before."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from opd.math import agreement, align, credit, divergence, states, support, trust

__all__ = ["agreement", "align", "credit", "divergence", "states", "support", "trust"]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"opd.math.{name}")
    raise AttributeError(f"module 'opd.math' has no attribute '{name}'")
