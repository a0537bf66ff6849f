"""Every CPU recipe as it stands: does it run, what does it teach, what does it cost?

    python bench/recipes.py [--only gad gkd ...] [--seeds 17]     # run and keep; finished ones are not run again
    python bench/recipes.py --table                               # print the table of results/recipes.jsonl

One process, one thread. A recipe is one line of results/recipes.jsonl and seed. These are first looks at each method on
one world with settings that nobody tuned against each other, not a ranking: bench/world.py compares with care.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "recipes.jsonl"


def known() -> dict[tuple[str, int], dict[str, Any]]:
    """What was run before, by recipe and seed."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return {(row["recipe"], row["seed"]): row for row in map(json.loads, lines)}


def one(name: str, seed: int) -> dict[str, Any]:
    """Run a recipe in a folder that is thrown away."""
    import opd

    with tempfile.TemporaryDirectory() as folder:
        began = time.process_time()
        run = opd.run(opd.load(ROOT / "recipes" / f"{name}.cpu.yaml", f"run.dir={folder}", f"run.seed={seed}"))
        spent, summary, before, after = time.process_time() - began, run.summary, run.before, run.after
    pair = lambda numbers: [round(numbers[f"eval/{kind}"], 4) for kind in ("accuracy", "accuracy_sampled")]
    return {
        "recipe": name,
        "seed": seed,
        "before": pair(before),
        "after": pair(after),
        "steps": summary["step"],
        "tokens": summary["tokens"],
        "cpu_s": round(spent, 1),
        "status": summary["status"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: means over seeds."""
    lines = [
        "| recipe | seeds | start | end | steps | spoken | learned | CPU-s |",
        "|---|---|---|---|---:|---:|---:|---:|",
    ]
    for name in sorted({row["recipe"] for row in rows}):
        own = [row for row in rows if row["recipe"] == name]
        mean = lambda pick, own=own: statistics.fmean(pick(row) for row in own)
        share = lambda key, mean=mean: " / ".join(f"{100 * mean(lambda r, k=k: r[key][k]):.0f}" for k in (0, 1))
        tokens = lambda kind, mean=mean: f"{mean(lambda r: r['tokens'][kind]) / 1000:.0f}k"
        cells = [name, str(len(own)), share("before"), share("after"), f"{mean(lambda r: r['steps']):.0f}"]
        cells += [tokens("generated"), tokens("trained"), f"{mean(lambda r: r['cpu_s']):.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+")
    parser.add_argument("--seeds", type=int, nargs="+", default=[17])
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    os.chdir(ROOT)
    names = args.only or sorted(path.name.removesuffix(".cpu.yaml") for path in (ROOT / "recipes").glob("*.cpu.yaml"))
    for name in names if not args.table else ():
        for seed in args.seeds:
            if (name, seed) not in known():
                row = one(name, seed)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print(table(list(known().values())))


if __name__ == "__main__":
    main()
