"""On-policy distillation of language models: any teacher, into your model, on the model's own samples.

`load`, `run`, `resume` and `open_run` are all there is to call from Python; the command line does the same. They are
looked up when they are first used, so that `import opd` loads nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opd.api import Loaded, Run, load, open_run, resume, run

__version__ = "0.1.0"
__all__ = ["Loaded", "Run", "load", "open_run", "resume", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'opd' has no attribute {name!r}")
    from opd import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
