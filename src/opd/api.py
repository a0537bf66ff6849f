"""opd from Python: a recipe in, a run out. The same checks and the same run folder as the command line.

run = opd.run(opd.load("recipes/token_opd.cpu.yaml", "train.steps=20"))
run.before["eval/accuracy"], run.after["eval/accuracy"]
run.samples(worst=True), run.report()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opd import recipe as recipes
from opd.errors import UsageError
from opd.log import RunFolder, read, read_json
from opd.recipe import Recipe, Resolved

if TYPE_CHECKING:
    from opd.report import Verdict

Watch = Callable[[str, Mapping[str, Any]], None]


@dataclass(frozen=True)
class Loaded:
    """A recipe that was checked, and the folder that its own functions (`./file.py:name`) are looked for in."""

    resolved: Resolved
    base: Path

    @property
    def recipe(self) -> Recipe:
        return self.resolved.recipe

    @property
    def equations(self) -> dict[str, str]:
        """What each stage minimises, by its name. Raises `UsageError` where a method asks what the recipe lacks."""
        from opd.legs import legs

        return {leg.name: str(leg.method.loss) for leg in legs(self.recipe, self.base)}


@dataclass(frozen=True)
class Run:
    """A run folder, finished or not. Reads files only, and loads no torch."""

    path: Path

    @cached_property
    def summary(self) -> Mapping[str, Any]:
        """summary.json: status, reason, steps, evaluations before and after, tokens, seconds.

        Raises `UsageError` where there is none: the run is going on, or was killed.
        """
        found: Mapping[str, Any] | None = read_json(self.path / "summary.json")
        if found is None:
            raise UsageError(f"{self.path} has no summary: it is running, or was killed. opd.resume goes on with it")
        return found

    @property
    def before(self) -> Mapping[str, float]:
        """The evaluation before the first step."""
        found: Mapping[str, float] = self.summary["before"]
        return found

    @property
    def after(self) -> Mapping[str, float]:
        """The last evaluation."""
        found: Mapping[str, float] = self.summary["after"]
        return found

    def metrics(self) -> list[dict[str, Any]]:
        """One row a step, and one (with `event: eval`) an evaluation."""
        return list(read(self.path / "metrics.jsonl"))

    def samples(self, **choice: Any) -> list[dict[str, Any]]:
        """What the student said: `step`, `worst`, `best`, `prompt` and `n` as in `opd samples`."""
        from opd.samples import select

        return select(self.path, **choice)

    def report(self, out: str | Path | None = None) -> Path:
        """Write the report, one HTML file; returns where it is."""
        from opd.report import render

        return render([self.path], Path(out) if out else self.path / "report.html")

    @property
    def verdict(self) -> Verdict:
        """Whether it is learning, and if not, why: `answer`, `evidence`, `why`, `remedy`; all of it is its `line`."""
        from opd.report import judged

        return judged(self.path)

    @property
    def model(self) -> Path:
        """The student as a folder that `AutoModelForCausalLM.from_pretrained` loads, once the run has ended."""
        return self.path / "model"


def load(recipe: str | Path | Mapping[str, Any], *more: str | Path) -> Loaded:
    """Read and check a recipe file (or plain data of the same shape); `more` are files over it and `key=value`.

    Raises `UsageError` with every problem at once. Loads no model and no torch.
    """
    if isinstance(recipe, Mapping):
        if more:
            raise UsageError("files and overrides go over a recipe's file; change plain data itself")
        built = recipes.build(recipe)
        return Loaded(Resolved(built, {}, recipes.dump(built)), Path.cwd())
    overrides = [str(part) for part in more if "=" in str(part) and not Path(part).is_file()]
    files = [Path(recipe), *(Path(part) for part in more if str(part) not in overrides)]
    return Loaded(recipes.load(files, overrides), files[0].resolve().parent)


def run(loaded: Loaded, *, watch: Watch | None = None) -> Run:
    """Train to the end. `watch(kind, numbers)` is told of every step, evaluation and warning.

    Raises `OpdError` when the run cannot go on; what it wrote stays in its folder.
    """
    from opd.runs import start

    return Run(start(loaded.resolved, loaded.base, watch=watch)[1])


def resume(folder: str | Path, *, watch: Watch | None = None) -> Run:
    """Go on with a run that was stopped, by its own recipe, to the bytes of an unbroken one."""
    from opd.runs import start

    return Run(start(None, None, resume=Path(folder), watch=watch)[1])


def open_run(folder: str | Path) -> Run:
    """A run that exists. Raises `UsageError` where there is none."""
    return Run(RunFolder.open(Path(folder)).path)
