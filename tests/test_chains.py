"""The recipes that chain: each runs in a short form, with the students and prompts that it says."""

from __future__ import annotations

from pathlib import Path

import pytest

import opd
from opd import snapshot
from opd.legs import legs
from opd.recipe import load

CHAINS = Path(__file__).parent.parent / "recipes" / "chains"
ALL = sorted(path.name for path in CHAINS.glob("*.yaml"))


@pytest.mark.parametrize("name", ALL)
def test_every_chain_checks_says_what_it_is_and_is_listed(name: str) -> None:
    found = legs(load([CHAINS / name]).recipe, CHAINS)
    assert len(found) > 1 and (CHAINS / name).read_text().startswith("# ")
    assert f"]({name})" in (CHAINS / "README.md").read_text()


@pytest.mark.parametrize("name", ALL)
def test_every_chain_runs_in_a_short_form(name: str, tmp_path: Path) -> None:
    plain = load([CHAINS / name]).recipe
    lengths = [f"stages.{i}.steps=1" for i in range(len(plain.stages))]
    sizes = [f"stages.{i}.train.prompts=6" for i in range(len(plain.stages))]
    short = ["eval.prompts=6", "eval.at_start=false", f"run.dir={tmp_path}"]
    run = opd.run(opd.load(CHAINS / name, *lengths, *sizes, *short))
    steps = [row for row in run.metrics() if "event" not in row]
    assert run.summary["status"] == "finished" and [row["stage"] for row in steps] == [s.name for s in plain.stages]
    assert all("grad/norm" in row for row in steps) and (run.model / "model.safetensors").is_file()
    by_stage = {row["stage"]: set[str]() for row in steps}
    for row in run.samples(n=10**6):
        by_stage[row["stage"]].add(row["domain"])
    for stage in plain.stages:
        assert stage.domains is None or by_stage[stage.name] <= set(stage.domains)
    homes = {teacher.stage for teacher in plain.teachers.values() if teacher.stage}
    assert all(snapshot.place(run.path, home).is_file() for home in homes)
