"""The report: run folders in, one self-contained HTML page out. It asks nothing of any network, and may be mailed."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined, Template
from markupsafe import Markup

from opd.errors import UsageError
from opd.log import replace_file
from opd.report import provenance, summary
from opd.report.curves import groups
from opd.report.excerpt import excerpt
from opd.report.lights import lights
from opd.report.run import Run, load
from opd.report.svg import COLOURS, number, swatch, visible
from opd.report.verdict import Verdict, verdict

LIMIT = 1_000_000  # bytes of the page
QUALITY = ((500_000, 150), (250_000, 150), (120_000, 80), (40_000, 50), (0, 20))  # (bytes of samples, points a curve)


def render(runs: Sequence[Path], out: Path) -> Path:
    """Write the page for one run, or the comparison of several, to `out`; returns it.

    Raises UsageError where a path is not a run folder, or a run is named twice.
    """
    if not runs:
        raise UsageError("a report needs at least one run folder")
    if len({path.resolve() for path in runs}) < len(runs):
        raise UsageError("a run is named twice; name each run once")
    loaded = _distinct([load(path) for path in runs])
    out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(out, html(loaded).encode("utf-8", "replace"))
    return out


def judged(run: Path) -> Verdict:
    """Whether a run is learning, and if not, why. Raises UsageError where the path is not a run folder."""
    return verdict(load(run))


def html(runs: Sequence[Run]) -> str:
    """The page as text, below `LIMIT` bytes: samples give way first, then the detail of curves."""
    style, script = _asset("style.css"), _asset("script.js")
    context = _context(runs) | {
        "style": Markup(style),
        "script": Markup(script),
        "policy": f"default-src 'none'; style-src '{_hash(style)}'; script-src '{_hash(script)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'",
    }
    page = ""
    for budget, detail in QUALITY:
        page = _template().render(context, excerpt=excerpt(runs, budget), charts=groups(runs, detail))
        if len(page.encode("utf-8", "replace")) < LIMIT:
            break
    return page


def _context(runs: Sequence[Run]) -> dict[str, Any]:
    views = [_view(run, index) for index, run in enumerate(runs)]
    return {
        "runs": views,
        "warned": any(view["warnings"] for view in views),
        "comparing": len(runs) > 1,
        "title": ", ".join(run.name for run in runs),
        "comparison": summary.comparison(runs) if len(runs) > 1 else None,
        "differences": provenance.recipe_differences(runs),
        "lock_differences": provenance.lock_differences(runs),
        "health": summary.health_table([lights(run) for run in runs]),
    }


def _view(run: Run, index: int) -> dict[str, Any]:
    """What the template says about one run."""
    return {
        "name": run.name,
        "anchor": f"run-{index + 1}",
        "swatch": swatch(index % COLOURS),
        "badge": summary.badge(run),
        "status_words": summary.status_words(run),
        "outcome": summary.outcome(run),
        "verdict": verdict(run),
        "method": run.method,
        "student": summary.model_words(run.plan.get("student") or run.recipe.get("student")),
        "teachers": summary.teacher_words(run),
        "tiles": summary.tiles(run),
        "objective": summary.objective(run),
        "lights": lights(run),
        "warnings": summary.warnings(run),
        "timeline": summary.timeline(run),
        "evaluations": summary.evaluation_table(run),
        "recipe": provenance.recipe_rows(run),
        "lock": provenance.lock_rows(run),
        "problems": run.problems,
        "path": str(run.path),
    }


def _distinct(runs: list[Run]) -> list[Run]:
    """Give runs of one name from different folders their folder's name too."""
    names = [run.name for run in runs]
    return [
        replace(run, name=f"{run.path.resolve().parent.name}/{run.name}") if names.count(run.name) > 1 else run
        for run in runs
    ]


@cache
def _asset(name: str) -> str:
    return files("opd.report").joinpath(name).read_text(encoding="utf-8")


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_visible
    )
    environment.filters["number"] = number
    return environment.from_string(_asset("page.html"))


def _visible(value: Any) -> Any:
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
