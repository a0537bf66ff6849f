"""Which evaluation was the best, and ending with its weights."""

from __future__ import annotations

from collections.abc import Mapping

from opd import checkpoint
from opd.diagnose import fallen
from opd.errors import UsageError
from opd.eval import LOWER_IS_BETTER
from opd.snapshot import load_weights
from opd.state import Run


def is_best(run: Run, numbers: Mapping[str, float]) -> bool:
    """Note the evaluation if none of a trained student was better inside the length band."""
    own, at = run.recipe.eval, run.at
    name = _metric(run)
    if own.keep == "best":
        _must_be_measured(run, name, numbers)
    value, ratio = numbers.get(name), numbers.get("eval/length_ratio", 1.0)
    inside = own.length_band is None or own.length_band[0] <= ratio <= own.length_band[1]
    if value is not None and (inside or at.step == 0):
        at.height = value if at.height is None else max(at.height, value)
    if at.step == 0 or value is None or not inside or not _better(name, value, at.best_value):
        return False
    at.best_step, at.best_value, at.best = at.step, value, dict(numbers)
    run.folder.event(at.step, "best", f"{name} {value:.4f}, the best so far")
    return True


def collapsed(run: Run) -> str | None:
    """Why the run should stop after the evaluation that was just made; None where nothing fell.

    Only shares of right answers are watched, and the start counts among the values that it may not fall from.
    """
    at, name, share = run.at, _metric(run), run.recipe.eval.collapse
    if share is None or name not in at.after or not name.startswith(("eval/dev_score", "eval/accuracy")):
        return None
    return None if at.height is None else fallen(name, at.after[name], at.height, at.after["eval/prompts"], share)


def _better(name: str, value: float, than: float | None) -> bool:
    return than is None or (value < than if name in LOWER_IS_BETTER else value > than)


def _metric(run: Run) -> str:
    name = run.recipe.eval.metric
    return name if "/" in name else f"eval/{name}"


def _must_be_measured(run: Run, name: str, numbers: Mapping[str, float]) -> None:
    own = run.recipe.eval
    later = name.startswith("critic/") and any(leg.method.loss.learned for leg in run.legs)
    if own.metric != "dev_score" and name not in numbers and not later:
        known = ", ".join(sorted(numbers))
        raise UsageError(f"eval.metric is `{own.metric}`, which is not measured here; there are {known}")
    if own.length_band is not None and "eval/length_ratio" not in numbers:
        raise UsageError(
            "eval.length_band compares the student's answers with the teacher's text on data.dev, and there is none: "
            "remove it, or use a method that hears the teacher's text"
        )


def take(run: Run) -> None:
    """Put the best weights back into the student, and say where there are none or they beat nothing."""
    at, name = run.at, _metric(run)
    if at.best_step is None or at.best_value is None:
        if run.recipe.eval.length_band is not None:
            remedy = "widen eval.length_band, or train until the lengths agree"
            run.folder.event(at.step, "warning", "no evaluation lay inside eval.length_band: the last is kept", remedy)
        return
    start = at.before.get(name)
    if start is not None and not _better(name, at.best_value, start):
        message = f"no evaluation beat the start: {name} was {start:.4f} and is {at.best_value:.4f} at best"
        run.folder.event(at.step, "warning", message, "lower train.lr, train longer, or look at the samples")
    place = checkpoint.complete(run.folder.checkpoints).get(at.best_step)
    if at.best_step != at.step and place is not None:
        load_weights(run.student.model.module, checkpoint.load(place)[0]["student"], str(place))
        at.after = at.best
        run.folder.event(at.step, "best", f"ends with the weights of step {at.best_step}, the best evaluated")
