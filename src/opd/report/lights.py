"""Health: a handful of rules over a run's curves, each with its threshold, what it found, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import fmean, median
from typing import Literal

from opd.report.run import Points, Run
from opd.report.svg import number

CRITIC_LOW, CRITIC_HIGH = 0.55, 0.90
LENGTH_RATIO = 1.3
TRUNCATED = 0.02
ENTROPY_LEFT = 0.5
SPIKE, SPIKE_SHARE, SPIKE_WINDOW = 5.0, 0.01, 50
DEGENERATE = 0.5
LENGTH_ONLY = 0.65


@dataclass(frozen=True, slots=True)
class Light:
    """One rule's finding. `why` and `remedy` are empty when it is good."""

    name: str
    status: Literal["good", "bad"]
    value: str
    rule: str
    why: str = ""
    remedy: str = ""


def lights(run: Run) -> list[Light]:
    """The rules that this run has the data for."""
    return [light for rule in RULES if (light := rule(run))]


def recent(points: Points) -> Points:
    """The last tenth of a curve, five points at the least."""
    return points[-max(5, len(points) // 10) :]


def _mean(points: Points) -> float:
    return fmean(value for _, value in points)


def _critic_accuracy(run: Run) -> Points:
    """Held out where that was measured often enough to average, else in training."""
    heldout, training = run.points("critic/heldout_accuracy"), run.points("critic/accuracy")
    return heldout if len(heldout) >= 5 or not training else training


def _critic(run: Run) -> Light | None:
    points = _critic_accuracy(run)
    if not points:
        return None
    value = _mean(recent(points))
    name, rule, shown = "critic accuracy", f"{CRITIC_LOW:.2f} to {CRITIC_HIGH:.2f}", f"{value:.2f}"
    if value > CRITIC_HIGH:
        return Light(
            name, "bad", shown, rule,
            "The critic tells student from teacher almost every time, often by one surface sign, so its reward no "
            "longer ranks the student's own samples.",
            "Lower critic.lr, warm the student up for longer, or look in the samples for the sign it found.",
        )  # fmt: skip
    if value < CRITIC_LOW:
        return Light(
            name, "bad", shown, rule,
            "The critic cannot tell student from teacher: either they have become alike, or it does not learn, and "
            "then its reward is noise.",
            "Read a few pairs in the samples; if they differ plainly, give the critic steps of its own "
            "(stages.critic.alone_steps) or a higher critic.lr.",
        )  # fmt: skip
    return Light(name, "good", shown, rule)


def _length_only(run: Run) -> Light | None:
    points = run.points("critic/length_only_accuracy")
    if not points:
        return None
    value = _mean(recent(points))
    good = value <= LENGTH_ONLY
    return Light(
        "critic beyond length",
        "good" if good else "bad",
        f"{value:.2f}",
        f"length alone ranks at most {LENGTH_ONLY:.2f}",
        "" if good else "Length by itself tells the answers apart, so the reward can be earned by length.",
        "" if good else "Compare the lengths below; check truncation and whether both texts end the same way.",
    )


def _length(run: Run) -> Light | None:
    points = run.points("length/ratio")
    if not points:
        teacher = dict(run.points("length/teacher_tokens"))
        student = run.points("length/student_tokens")
        points = [(step, value / teacher[step]) for step, value in student if teacher.get(step)]
    if not points:
        return None
    value = _mean(recent(points))
    good = value <= LENGTH_RATIO
    return Light(
        "length ratio",
        "good" if good else "bad",
        f"{value:.2f}",
        f"student / teacher at most {LENGTH_RATIO}",
        "" if good else "The student's answers grow beyond the teacher's; critics and judges reward length.",
        "" if good else "Penalise length in the reward, or read the longest samples for padding and repetition.",
    )


def _truncated(run: Run) -> Light | None:
    points = run.points("length/truncated_share")
    if not points:
        return None
    value = _mean(recent(points))
    good = value <= TRUNCATED
    return Light(
        "truncated answers",
        "good" if good else "bad",
        number(value, percent=True),
        f"at most {number(TRUNCATED, percent=True)}",
        "" if good else "Answers are cut at the limit, so what is judged there is the cut, not the quality.",
        "" if good else "Raise speak.max_tokens, or drop the prompts that need more.",
    )


def _entropy(run: Run) -> Light | None:
    points = run.points("entropy/student_nats")
    if len(points) < 10:
        return None
    start, end = _mean(points[: len(recent(points))]), _mean(recent(points))
    if start <= 0:
        return None
    good = end >= ENTROPY_LEFT * start
    return Light(
        "entropy",
        "good" if good else "bad",
        f"{start:.2g} → {end:.2g} nats",
        f"keeps at least {ENTROPY_LEFT:.0%} of its start".replace("%", " %"),
        "" if good else "The student's distribution is collapsing: its samples become alike and teach less and less.",
        ""
        if good
        else "Lower the rate, raise the KL to the reference, or compare with the teacher's entropy below: "
        "a sharp teacher asks for a sharp student.",
    )


def _gradients(run: Run) -> Light | None:
    points = run.points("grad/norm")
    if len(points) < 10:
        return None
    spikes: list[tuple[float, float]] = []
    for index in range(5, len(points)):
        usual = median(value for _, value in points[max(0, index - SPIKE_WINDOW) : index])
        step, value = points[index]
        if usual > 0 and value > SPIKE * usual:
            spikes.append((step, value / usual))
    allowed = max(1, int(SPIKE_SHARE * len(points)))
    good = len(spikes) <= allowed
    worst = max(spikes, key=lambda spike: spike[1], default=None)
    shown = f"{len(spikes)} of {len(points)} steps"
    if worst:
        shown += f", worst {worst[1]:.0f}x at step {worst[0]:.0f}"
    return Light(
        "gradient spikes",
        "good" if good else "bad",
        shown,
        f"at most {allowed} above {SPIKE:.0f}x the median of the {SPIKE_WINDOW} before",
        "" if good else "Some batches pull far harder than the others and can undo many steps.",
        "" if good else "Lower train.lr or clip tighter, and read the samples of the worst step.",
    )


def _degenerate(run: Run) -> Light | None:
    points = run.points("group/degenerate_share")
    if not points:
        return None
    value = _mean(recent(points))
    good = value <= DEGENERATE
    return Light(
        "degenerate groups",
        "good" if good else "bad",
        number(value, percent=True),
        f"at most {number(DEGENERATE, percent=True)} with all rewards equal",
        "" if good else "In most groups all samples earn the same, so nothing says which was better.",
        "" if good else "Use harder or easier prompts, more samples a group, or a finer reward.",
    )


RULES: tuple[Callable[[Run], Light | None], ...] = (
    _critic,
    _length_only,
    _length,
    _truncated,
    _entropy,
    _gradients,
    _degenerate,
)
