"""The pictures of the README from the run folders of a demo: `python docs/pictures.py runs/demo`.

panel.svg is the live panel as it stood near the end of the GAD run; report.png is the head of the demo's report in
Chromium.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console

from opd.log import read, read_json
from opd.panel import View

IMAGES = Path(__file__).parent / "images"


def panel(run: Path) -> None:
    """Replay a run's numbers through the panel and keep its last look."""
    view = View()
    stages = {s["name"]: s for s in read_json(run / "plan.json")["stages"]}
    rows, perf = read(run / "metrics.jsonl"), {r["step"]: r for r in read(run / "perf.jsonl")}
    for row in rows:
        if row.get("event") == "eval":
            view.see("eval", row)
            continue
        if row["stage"] != view.stage:
            steps = sum(1 for r in rows if r["stage"] == row["stage"] and "event" not in r)
            view.see("stage", {"name": row["stage"], "steps": steps, "equation": stages[row["stage"]]["equation"]})
        view.see("step", {**row, **perf.get(row["step"], {})})
    console = Console(record=True, width=96, file=io.StringIO())
    console.print(view.render())
    console.save_svg(str(IMAGES / "panel.svg"), title="opd train")


def report(page: Path) -> None:
    """The report's first screens as a picture."""
    with tempfile.TemporaryDirectory() as profile:
        command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync"]
        command += ["--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}"]
        shot = IMAGES / "report.png"
        command += ["--window-size=1320,1000", f"--screenshot={shot}", page.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


if __name__ == "__main__":
    demo = Path(sys.argv[1])
    panel(demo / "gad")
    report(demo / "report.html")
