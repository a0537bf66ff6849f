"""Where a run came from: its recipe with the origin of each value, its lock, and how these differ between runs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from opd.report.run import Run, flatten


@dataclass(frozen=True, slots=True)
class Row:
    """One value of a recipe or lock; `origin` is a file and line, an override, or "default"."""

    key: str
    value: str
    origin: str = ""


@dataclass(frozen=True, slots=True)
class Difference:
    """One key on which runs disagree, with each run's value in order."""

    key: str
    values: tuple[str, ...]


def recipe_rows(run: Run) -> tuple[list[Row], list[Row]]:
    """(what was chosen, what was left at its default), by dotted key."""
    rows = [Row(key, shown(value), _origin(run, key)) for key, value in flatten(run.recipe).items()]
    chosen = [row for row in rows if row.origin and row.origin != "default"]
    if not chosen:  # no origins recorded: then nothing can be said to be a default
        return rows, []
    return chosen, [row for row in rows if row not in chosen]


def lock_rows(run: Run) -> list[Row]:
    """Versions, seeds and hashes."""
    return [Row(key, shown(value)) for key, value in flatten(run.lock).items()]


def recipe_differences(runs: Sequence[Run]) -> tuple[list[Difference], list[Difference]]:
    """Recipe keys on which the runs disagree: (those that all of them have, those that only some have)."""
    flat = [flatten(run.recipe) for run in runs]
    found = _differences(flat)
    shared = [row for row in found if all(row.key in one for one in flat)]
    return shared, [row for row in found if row not in shared]


def lock_differences(runs: Sequence[Run]) -> list[Difference]:
    """Versions, hashes and settings of the machine on which the runs disagree."""
    return _differences([flatten(run.lock) for run in runs])


def shown(value: Any) -> str:
    """A value of a recipe as one line of text."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _differences(flat: list[dict[str, Any]]) -> list[Difference]:
    keys = dict.fromkeys(key for one in flat for key in one)
    rows = [Difference(key, tuple(shown(one[key]) if key in one else "–" for one in flat)) for key in keys]
    return [row for row in rows if len(set(row.values)) > 1]


def _origin(run: Run, key: str) -> str:
    """The key's own origin, or that of the nearest enclosing key that has one."""
    while key:
        if key in run.origins:
            return str(run.origins[key])
        key = key.rpartition(".")[0]
    return ""
