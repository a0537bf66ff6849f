"""The built-in world: tiny teachers, students, two tokenizers and prompts, so that every method runs on any machine.

A recipe says `model: world:teacher` for a model and `path: world:sort` for the prompts of a task. No torch here.
"""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from opd.errors import UsageError
from opd.tasks import DOMAINS, Split
from opd.tasks import prompts as task_prompts
from opd.types import Prompt

__all__ = ["EXPERTS", "MODELS", "PREFIX", "STUDENTS", "path", "prompts"]

PREFIX = "world:"
STUDENTS = ("student", "student-merged")
EXPERTS = tuple(f"expert-{domain}" for domain in DOMAINS)  # teachers of one domain, useless in the others
MODELS = ("teacher", *STUDENTS, *EXPERTS)


def path(name: str) -> Path:
    """The Hugging Face folder of one of `MODELS`, with or without `world:`.

    Raises `UsageError` for another name, and where the package was installed without the world's files.
    """
    short = name.removeprefix(PREFIX)
    if short not in MODELS:
        raise UsageError(f"'{name}' is not a model of the built-in world; {', '.join(PREFIX + m for m in MODELS)} are.")
    folder = Path(str(files("opd.world") / "assets" / short))
    if not (folder / "config.json").is_file():
        raise UsageError(f"'{name}' should lie in {folder}, which has no config.json; run `python -m opd.world.make`.")
    return folder


def prompts(name: str, n: int, seed: int = 0, split: Split = "train") -> tuple[Prompt, ...]:
    """`opd.tasks.prompts`, by the name that a recipe uses: `sort` or `world:sort`."""
    return task_prompts(name.removeprefix(PREFIX), n, seed, split)
