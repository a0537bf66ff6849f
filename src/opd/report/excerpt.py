"""Which samples go into the page: as many steps, rows and characters as its size allows, shared fairly among runs."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from opd.log import read
from opd.report.run import Run, finite

NUMBERS = ("sample", "tokens", "reward", "score", "teacher_score")
_UNSAFE = re.compile(r"[<>&\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")  # json escapes those below a space
WORDS = ("stage", "prompt_id", "domain", "speaker", "finish")


@dataclass(frozen=True, slots=True)
class Level:
    """How much of each run is taken: steps, rows a step, characters a text; and whether per-token values come along."""

    steps: int
    rows: int
    characters: int
    tokens: bool


LEVELS = (
    Level(10_000, 64, 6000, True),
    Level(60, 16, 4000, True),
    Level(30, 8, 3000, True),
    Level(20, 8, 2000, True),
    Level(20, 6, 1600, False),
    Level(12, 5, 1200, False),
    Level(8, 4, 800, False),
    Level(5, 3, 500, False),
    Level(3, 2, 300, False),
)


@dataclass(frozen=True, slots=True)
class Excerpt:
    """The page's samples: `payload` is what its script reads, `shown` of `total` rows are in it."""

    payload: Mapping[str, Any]
    shown: int
    total: int

    @property
    def script(self) -> Markup:
        """The payload as JSON that is inert inside <script type="application/json">."""
        return inert_json(self.payload)

    @property
    def first(self) -> list[dict[str, Any]]:
        """A few rows of the last step, as the page shows them before (or without) its script."""
        rows, texts = self.payload["rows"], self.payload["texts"]
        last = max((row["step"] for row in rows), default=0)
        chosen = [row for row in rows if row["step"] == last and row["run"] == 0][:3]
        keys = ("prompt", "text", "teacher_text")
        return [{**row, **{key: texts[row[key]] if row[key] is not None else None for key in keys}} for row in chosen]


def excerpt(runs: Sequence[Run], budget: int) -> Excerpt:
    """The richest level whose JSON fits in `budget` bytes (the poorest one if none does)."""
    recorded = [_valid(run) for run in runs]
    total = sum(len(rows) for rows in recorded)
    for level in LEVELS:
        payload = _payload(runs, recorded, level)
        if len(inert_json(payload)) <= budget:
            break
    return Excerpt(payload, len(payload["rows"]), total)


def inert_json(value: Any) -> Markup:
    """JSON without the characters that HTML or an old script parser could act on."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return Markup(_UNSAFE.sub(lambda found: f"\\u{ord(found[0]):04x}", text))


def _valid(run: Run) -> list[dict[str, Any]]:
    """Rows with a step and a text; of one that was written twice (resumed before `rewind`), the later."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in read(run.path / "samples.jsonl"):
        if isinstance(row.get("step"), int) and isinstance(row.get("text"), str):
            key = tuple(str(row.get(name)) for name in ("step", "stage", "prompt_id", "sample", "speaker"))
            found[key] = row
    return sorted(found.values(), key=lambda row: int(row["step"]))


def _payload(runs: Sequence[Run], recorded: Sequence[list[dict[str, Any]]], level: Level) -> dict[str, Any]:
    texts: dict[str, int] = {}

    def index(value: Any) -> int | None:
        if not isinstance(value, str):
            return None
        return texts.setdefault(_cut(value, level.characters), len(texts))

    rows = []
    for number, found in enumerate(recorded):
        steps = _spread(sorted({int(row["step"]) for row in found}), level.steps)
        for step in steps:
            for row in [r for r in found if r["step"] == step][: level.rows]:
                rows.append(
                    {"run": number, "step": step}
                    | {name: str(row.get(name) or "") for name in WORDS}
                    | {name: _rounded(row.get(name), 5) for name in NUMBERS}
                    | {name: index(row.get(name)) for name in ("prompt", "text", "teacher_text")}
                    | (_per_token(row) if level.tokens else {})
                )
    return {"runs": [run.name for run in runs], "texts": list(texts), "rows": rows}


def _per_token(row: Mapping[str, Any]) -> dict[str, Any]:
    kl, pieces = row.get("kl_per_token"), row.get("pieces")
    if not isinstance(kl, list) or not isinstance(pieces, list) or len(kl) != len(pieces):
        return {}
    return {"kl": [_rounded(value, 3) for value in kl], "pieces": [str(piece) for piece in pieces]}


def _rounded(value: Any, digits: int) -> float | None:
    number = finite(value)
    return None if number is None else round(number, digits)


def _spread(steps: list[int], most: int) -> list[int]:
    """At most `most` of the steps, evenly spread, the first and the last among them."""
    if len(steps) <= most:
        return steps
    return [steps[round(i * (len(steps) - 1) / (most - 1))] for i in range(most)]


def _cut(text: str, most: int) -> str:
    return text if len(text) <= most else f"{text[:most]} … [{len(text) - most} more characters]"
