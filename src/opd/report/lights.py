"""Health: a handful of rules over a run's curves, each with its threshold, what it found, and what to do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import fmean, median
from typing import Literal, NamedTuple

from opd.report.run import Points, Run
from opd.report.svg import number

CRITIC_LOW, CRITIC_HIGH = 0.55, 0.90
LENGTH_RATIO = 1.3
TRUNCATED = 0.02
ENTROPY_LEFT = 0.5
SPIKE, SPIKE_SHARE, SPIKE_WINDOW = 5.0, 0.01, 50
DEGENERATE = 0.5
LENGTH_ONLY = 0.65
MISMATCH = 0.01
REPEATING = 0.02


@dataclass(frozen=True, slots=True)
class Light:
    """One rule's finding. `why` and `remedy` are empty when it is good."""

    name: str
    status: Literal["good", "bad"]
    value: str
    rule: str
    why: str = ""
    remedy: str = ""


class Reading(NamedTuple):
    """What a rule looks at in a run, and how it is shown."""

    value: float
    shown: str


Advice = tuple[str, str]  # why it matters, what to do


@dataclass(frozen=True, slots=True)
class Rule:
    """A value that should lie between `low` and `high`, and what is said below and above."""

    name: str
    read: Callable[[Run], Reading | None]
    words: str
    low: float = float("-inf")
    high: float = float("inf")
    below: Advice = ("", "")
    above: Advice = ("", "")

    def light(self, run: Run) -> Light | None:
        """What it finds; None where the run lacks the data."""
        found = self.read(run)
        if found is None:
            return None
        advice = self.below if found.value < self.low else self.above if found.value > self.high else None
        return Light(self.name, "bad" if advice else "good", found.shown, self.words, *(advice or ()))


def lights(run: Run) -> list[Light]:
    """The rules that this run has the data for."""
    return [light for rule in RULES if (light := rule.light(run))]


def recent(points: Points) -> Points:
    """The last tenth of a curve, five points at the least."""
    return points[-max(5, len(points) // 10) :]


def _mean(points: Points) -> float:
    return fmean(value for _, value in points)


# --- what the rules read ----------------------------------------------------------------------------------------------


def _recent_of(key: str, run: Run, percent: bool = False) -> Reading | None:
    return _shown(run.points(key), percent)


def _shown(points: Points, percent: bool = False) -> Reading | None:
    if not points:
        return None
    value = _mean(recent(points))
    return Reading(value, number(value, percent=True) if percent else f"{value:.2f}")


def _critic(run: Run) -> Reading | None:
    """Held out where that was measured often enough to average, else in training."""
    heldout, training = run.points("critic/heldout_accuracy"), run.points("critic/accuracy")
    return _shown(heldout if len(heldout) >= 5 or not training else training)


def _length(run: Run) -> Reading | None:
    if points := run.points("length/ratio"):
        return _shown(points)
    teacher = dict(run.points("length/teacher_tokens"))
    student = run.points("length/student_tokens")
    return _shown([(step, value / teacher[step]) for step, value in student if teacher.get(step)])


def _entropy(run: Run) -> Reading | None:
    points = run.points("entropy/student_nats")
    if len(points) < 10:
        return None
    start, end = _mean(points[: len(recent(points))]), _mean(recent(points))
    return Reading(end / start, f"{start:.2g} → {end:.2g} nats") if start > 0 else None


def _gradients(run: Run) -> Reading | None:
    """How many spikes there are beyond the number that is let pass."""
    points = run.points("grad/norm")
    if len(points) < 10:
        return None
    spikes: list[tuple[float, float]] = []
    for index in range(5, len(points)):
        usual = median(value for _, value in points[max(0, index - SPIKE_WINDOW) : index])
        step, value = points[index]
        if usual > 0 and value > SPIKE * usual:
            spikes.append((step, value / usual))
    worst = max(spikes, key=lambda spike: spike[1], default=None)
    shown = f"{len(spikes)} of {len(points)} steps"
    if worst:
        shown += f", worst {worst[1]:.0f}x at step {worst[0]:.0f}"
    return Reading(len(spikes) - max(1, int(SPIKE_SHARE * len(points))), shown)


def _share_of(key: str) -> Callable[[Run], Reading | None]:
    return partial(_recent_of, key, percent=True)


# --- the rules --------------------------------------------------------------------------------------------------------

RULES = (
    Rule(
        "critic accuracy",
        _critic,
        f"{CRITIC_LOW:.2f} to {CRITIC_HIGH:.2f}",
        low=CRITIC_LOW,
        high=CRITIC_HIGH,
        below=(
            "The critic cannot tell student from teacher: either they have become alike, or it does not learn, and "
            "then its reward is noise.",
            "Read a few pairs in the samples; if they differ plainly, give the critic steps of its own "
            "(stages.critic.alone_steps) or a higher critic.lr.",
        ),
        above=(
            "The critic tells student from teacher almost every time, often by one surface sign, so its reward no "
            "longer ranks the student's own samples.",
            "Lower critic.lr, warm the student up for longer, or look in the samples for the sign it found.",
        ),
    ),
    Rule(
        "critic beyond length",
        partial(_recent_of, "critic/length_only_accuracy"),
        f"length alone ranks at most {LENGTH_ONLY:.2f}",
        high=LENGTH_ONLY,
        above=(
            "Length by itself tells the answers apart, so the reward can be earned by length.",
            "Compare the lengths below; check truncation and whether both texts end the same way.",
        ),
    ),
    Rule(
        "length ratio",
        _length,
        f"student / teacher at most {LENGTH_RATIO}",
        high=LENGTH_RATIO,
        above=(
            "The student's answers grow beyond the teacher's; critics and judges reward length.",
            "Penalise length in the reward, or read the longest samples for padding and repetition.",
        ),
    ),
    Rule(
        "truncated answers",
        _share_of("length/truncated_share"),
        f"at most {number(TRUNCATED, percent=True)}",
        high=TRUNCATED,
        above=(
            "Answers are cut at the limit, so what is judged there is the cut, not the quality.",
            "Raise speak.max_tokens, or drop the prompts that need more.",
        ),
    ),
    Rule(
        "repeating answers",
        _share_of("text/repeating_share"),
        f"at most {number(REPEATING, percent=True)} that compress tenfold",
        high=REPEATING,
        above=(
            "Answers go round in circles: the beginning of a collapse.",
            "Read the longest samples; lower train.lr, add a KL to the reference, mix in recorded answers.",
        ),
    ),
    Rule(
        "entropy",
        _entropy,
        f"keeps at least {ENTROPY_LEFT:.0%} of its start".replace("%", " %"),
        low=ENTROPY_LEFT,
        below=(
            "The student's distribution is collapsing: its samples become alike and teach less and less.",
            "Lower the rate, raise the KL to the reference, or compare with the teacher's entropy below: "
            "a sharp teacher asks for a sharp student.",
        ),
    ),
    Rule(
        "gradient spikes",
        _gradients,
        f"at most one in {1 / SPIKE_SHARE:.0f} steps above {SPIKE:.0f}x the median of the {SPIKE_WINDOW} before",
        high=0.0,
        above=(
            "Some batches pull far harder than the others and can undo many steps.",
            "Lower train.lr or clip tighter, and read the samples of the worst step.",
        ),
    ),
    Rule(
        "sampler and trainer",
        _share_of("mismatch/outside_share"),
        f"at most {number(MISMATCH, percent=True)} of the tokens twice as likely to one as to the other",
        high=MISMATCH,
        above=(
            "The engine that speaks and the trainer are not the same student.",
            "Give both the same precision, sampling settings and weights, or mask such tokens with a band gate.",
        ),
    ),
    Rule(
        "degenerate groups",
        _share_of("group/degenerate_share"),
        f"at most {number(DEGENERATE, percent=True)} with all rewards equal",
        high=DEGENERATE,
        above=(
            "In most groups all samples earn the same, so nothing says which was better.",
            "Use harder or easier prompts, more samples a group, or a finer reward.",
        ),
    ),
)
