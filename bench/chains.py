"""The recipes of recipes/chains, run over seeds: how right the student is, by domain, at the end of each stage.

    python bench/chains.py --seeds 17 18           # run; finished cells are skipped
    python bench/chains.py --table                 # docs/results/chains.md's table

A cell is a chain, a variant (overrides that take something out) and a seed of order and sampling; it is a line of
results/chains.jsonl. Accuracy is the share of dev prompts (60 a domain) answered right, the mean of four samples at
temperature 1. One process, one thread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import opd

ROOT = Path(__file__).parent.parent
CHAINS = ROOT / "recipes" / "chains"
RESULTS = Path(__file__).parent / "results" / "chains.jsonl"
VARIANTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "experts-then-merge": ("experts-then-merge", ()),
    "rl-opd-rl": ("rl-opd-rl", ()),
    "rl-opd-rl, by whole distributions": (
        "rl-opd-rl",
        ("stages.opd.method=full_vocab", "stages.opd.train.prompts=96"),
    ),
    "new-facts-then-earlier-self": ("new-facts-then-earlier-self", ()),
    "cold-start": ("cold-start", ()),
    "cold-start, without it": ("cold-start", ("stages.cold-start=null",)),
    "cold-start, plain prompts only": ("cold-start", ("stages.opd.domains=[plain]",)),
}


def measure(variant: str, seed: int) -> dict[str, Any]:
    """Run a cell in a folder that is thrown away; accuracy by stage and domain."""
    chain, overrides = VARIANTS[variant]
    began = time.process_time()
    with tempfile.TemporaryDirectory() as folder:
        own = (f"run.dir={folder}", f"run.seed={seed}", "eval.samples=4", "eval.greedy=false", *overrides)
        run = opd.run(opd.load(CHAINS / f"{chain}.cpu.yaml", *own))
        rows = [row for row in run.metrics() if row.get("event") == "eval"]
    stages = {"start" if row["step"] == 0 else row["stage"]: accuracies(row) for row in rows}
    return {"variant": variant, "seed": seed, "stages": stages, "cpu_s": round(time.process_time() - began)}


def accuracies(row: dict[str, Any]) -> dict[str, float]:
    """Sampled accuracy by domain."""
    end = "/accuracy_sampled"
    return {k.split("/")[1]: round(v, 4) for k, v in row.items() if k.endswith(end) and k.count("/") == 2}


def finished() -> list[dict[str, Any]]:
    """Every cell that was measured."""
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.is_file() else []


def table(cells: Sequence[dict[str, Any]]) -> str:
    """Markdown: a row a stage, a column a domain; mean over seeds, with lowest and highest if there are several."""
    out = []
    for variant in VARIANTS:
        mine = sorted((c for c in cells if c["variant"] == variant), key=lambda c: c["seed"])
        if not mine:
            continue
        domains = list(mine[0]["stages"]["start"])
        seconds = statistics.mean(c["cpu_s"] for c in mine)
        seeds = ", ".join(str(c["seed"]) for c in mine)
        out += [f"**{variant}** (seed {seeds}; {seconds:.0f} CPU-seconds)", ""]
        out += [f"| after stage | {' | '.join(domains)} |", "|---|" + "---|" * len(domains)]
        for stage in mine[0]["stages"]:
            values = [[100 * c["stages"][stage][d] for c in mine] for d in domains]
            said = [f"{statistics.mean(v):.0f}" + f" [{min(v):.0f}-{max(v):.0f}]" * (len(v) > 1) for v in values]
            out.append(f"| {stage} | {' | '.join(said)} |")
        out.append("")
    return "\n".join(out)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--table", action="store_true")
    args = parser.parse_args()
    if args.table:
        print(table(finished()))
        return
    known = {(c["variant"], c["seed"]) for c in finished()}
    for seed in args.seeds:
        for variant in args.variants:
            if (variant, seed) not in known:
                cell = measure(variant, seed)
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(cell) + "\n")
                print(json.dumps(cell), flush=True)


if __name__ == "__main__":
    main()
