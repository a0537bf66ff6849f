"""Is this run learning, and if not, why: one line from a run's record, with the numbers that say so and what to do.

Where it goes is read from the evaluations, or, where those say nothing yet, from what the method makes small or large.
Why it does not go there is the first row of `CAUSES` whose signs are all seen.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import pairwise
from math import hypot, sqrt
from statistics import fmean
from typing import Any, Literal

from opd.report.run import Estimate, Points, Run
from opd.report.svg import number

Answer = Literal["learning", "learning slowly", "not learning", "going backwards", "cannot tell yet"]

FEW = 8  # points of a curve, below which it has no direction
ENOUGH = 30  # steps after which a curve that went nowhere is not learning
SURE = 3.0  # standard errors
SMALL = 0.1  # of a distance: a fall of less is slow
AIMS = (("kl/reverse_nats", -1), ("reward/mean", 1), ("loss/nll", -1), ("loss/total", -1))  # what should go where
LOWER_IS_BETTER = ("bits_per_byte",)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The answer, the numbers that it rests on, and where it is not "learning" the likely cause and its remedy."""

    answer: Answer
    evidence: tuple[str, ...]
    why: str = ""
    remedy: str = ""

    @property
    def line(self) -> str:
        """All of it in one line."""
        return " ".join(filter(None, [f"{self.answer}: {'; '.join(self.evidence)}.", self.why, self.remedy]))

    @property
    def plain(self) -> Mapping[str, Any]:
        """For JSON."""
        return {"answer": self.answer, "evidence": list(self.evidence), "why": self.why, "remedy": self.remedy}


# --- what a curve did -------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Course:
    """A curve's first and last fifth (of the last stage): their means, their steps, and the error of the difference."""

    key: str
    first: float
    last: float
    steps: tuple[int, int, int, int]
    error: float

    @property
    def change(self) -> float:
        return self.last - self.first

    @property
    def sure(self) -> bool:
        return abs(self.change) > SURE * self.error

    def __str__(self) -> str:
        share = is_share(self.key)
        a, b, c, d = self.steps
        first, last = number(self.first, share), number(self.last, share)
        return f"{words(self.key)} {first} → {last} (steps {a}–{b} → {c}–{d})"


def course(run: Run, key: str) -> Course | None:
    """What a metric did in the last stage; None where it was measured too seldom."""
    start = run.stages[-1][0] if run.stages else 0
    points = [p for p in run.points(key) if p[0] >= start]
    if len(points) < FEW:
        return None
    n = max(3, len(points) // 5)
    head, tail = points[:n], points[-n:]
    steps = (int(head[0][0]), int(head[-1][0]), int(tail[0][0]), int(tail[-1][0]))
    return Course(key, _mean(head), _mean(tail), steps, _noise(points) * (2 / n) ** 0.5)


def _mean(points: Points) -> float:
    return fmean(value for _, value in points)


def _noise(points: Points) -> float:
    """Deviation of a curve around its course, from neighbours' differences, which a trend hardly moves."""
    return sqrt(fmean((b[1] - a[1]) ** 2 for a, b in pairwise(points)) / 2)


def is_share(key: str) -> bool:
    """Whether a metric is a share of 1."""
    return key.endswith(("_share", "accuracy", "_mass", "overlap/ratio"))


WORDS = {
    "kl/reverse_nats": "KL(student || teacher)",
    "overlap/ratio": "overlap of likely tokens",
    "reward/mean": "mean reward",
    "length/student_tokens": "tokens an answer",
    "length/truncated_share": "answers cut at the limit",
    "text/repeating_share": "answers that repeat themselves",
    "entropy/student_nats": "the student's entropy",
    "group/degenerate_share": "groups with equal rewards",
    "clip/positive_stopped_share": "tokens to be raised that the clip stops",
    "mismatch/outside_share": "tokens on which sampler and trainer differ twofold",
    "leak/certain_share": "tokens only the informed judge can know",
    "critic/accuracy": "critic's accuracy",
    "grad/empty_steps": "steps in a row without a gradient",
}


def words(key: str) -> str:
    """A metric's name in words."""
    return WORDS.get(key, key)


# --- why --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Sign:
    """What a metric (a pattern: any that fits) must have done: where its last fifth lies, and how it got there."""

    key: str
    above: float | None = None
    below: float | None = None
    grew: float | None = None  # the last fifth over the first, at least
    shrank: float | None = None  # at most
    still: float | None = None  # the difference of the two, at most, either way

    def seen(self, run: Run) -> str | None:
        """The evidence, or None."""
        found = (course(run, key) for key in run.keys if fnmatch(key, self.key))
        return next((str(c) for c in found if c is not None and self._holds(c)), None)

    def _holds(self, c: Course) -> bool:
        ratio = c.last / c.first if c.first > 0 else None
        return all(
            (
                self.above is None or c.last > self.above,
                self.below is None or c.last < self.below,
                self.grew is None or (ratio is not None and ratio >= self.grew),
                self.shrank is None or (ratio is not None and ratio <= self.shrank),
                self.still is None or abs(c.change) <= self.still,
            )
        )


@dataclass(frozen=True, slots=True)
class Cause:
    """A row of the table: what is seen, what it means, what to do."""

    signs: tuple[Sign, ...]
    why: str
    remedy: str


CAUSES = (
    Cause(
        (Sign("mismatch/outside_share", above=0.02),),
        "The engine that speaks and the trainer give the same tokens other probabilities, so what is learned is about "
        "another student.",
        "Give both the same precision, sampling settings and weights; until then mask such tokens with a `band` gate.",
    ),
    Cause(
        (Sign("group/degenerate_share", above=0.8),),
        "In most groups all answers earn the same, so nothing says which was better.",
        "Raise the group or speak.temperature, or choose prompts that the student sometimes gets right.",
    ),
    Cause(
        (Sign("grad/empty_steps", above=0.5),),
        "Most steps had nothing to learn from.",
        "Look at the rewards and the gates: every credit is 0.",
    ),
    Cause(
        (Sign("text/repeating_share", above=0.05), Sign("length/student_tokens", grew=1.2)),
        "Answers grow and repeat themselves: the inflation that ends in a collapse (Stable-OPD).",
        "Fork an earlier checkpoint with a KL to the reference and a share of recorded answers, and a lower train.lr.",
    ),
    Cause(
        (Sign("length/truncated_share", above=0.3), Sign("length/student_tokens", grew=1.2)),
        "Answers grow until they are cut, and what is judged there is the cut.",
        "Read the longest samples; lower train.lr or add a KL to the reference; if they are good, raise "
        "speak.max_tokens.",
    ),
    Cause(
        (Sign("kl/reverse_nats", grew=1.3),),
        "The student moves away from the teacher that it is pulled to: the steps are too large, or too noisy.",
        "Lower train.lr tenfold, or begin with train.warmup_steps.",
    ),
    Cause(
        (Sign("entropy/student_nats", shrank=0.2),),
        "The student's distribution has collapsed: its samples are alike and teach nothing new.",
        "Lower train.lr, raise the KL to the reference, raise speak.temperature, or go back to the best checkpoint.",
    ),
    Cause(
        (Sign("entropy/student_nats", grew=2.0),),
        "The student's distribution flattens: it forgets faster than it learns.",
        "Lower train.lr tenfold.",
    ),
    Cause(
        (Sign("clip/positive_stopped_share", above=0.5),),
        "The anchor's clip stops most of what should become likelier, so only the falls are left.",
        "Anchor at the old student, widen the clip's upper side, or make fewer updates on a batch.",
    ),
    Cause(
        (Sign("gate/*_open_share", below=0.02),),
        "A gate lets almost nothing through.",
        "Look at what it asks (the start line prints it) and widen it.",
    ),
    Cause(
        (Sign("overlap/ratio", below=0.75, still=0.05),),
        "Teacher and student do not agree on which tokens are likely next, and come no nearer (Rethinking OPD).",
        "Check that both read the same template; then an off-policy cold start (seqkd or token_kd on the teacher's "
        "text), or prompts of the kind that the teacher was trained on.",
    ),
    Cause(
        (Sign("critic/accuracy", above=0.45, below=0.55),),
        "The critic cannot tell teacher from student, so its reward is noise.",
        "Read a few pairs in the samples: if they are alike, stop; else critic.alone_steps or a higher critic.lr.",
    ),
    Cause(
        (Sign("critic/accuracy", above=0.97),),
        "The critic knows the student at once, often by one surface mark, so its reward ranks nothing of worth.",
        "Find the mark in the samples (length, format, an end); warm up longer; lower critic.lr.",
    ),
    Cause(
        (Sign("leak/certain_share", above=0.05),),
        "The judge is sure because of what it alone was shown: the student is taught to guess what it cannot know.",
        "Show the judge less (a hint in place of the answer), or gate its certain tokens out.",
    ),
    Cause(
        (Sign("kl/reverse_nats", shrank=0.8),),
        "The student follows the teacher, and the evaluation does not follow: the teacher is no better at this, or the "
        "evaluation asks for another form.",
        "Evaluate the teacher on data.dev; read the samples beside the evaluation's truth.",
    ),
    Cause(
        (Sign("overlap/ratio", above=0.9), Sign("kl/reverse_nats", below=0.02)),
        "Student and teacher say nearly the same already: there is little left to learn from this teacher.",
        "Stop here, or take a better teacher or other prompts.",
    ),
)
DEFAULT = {
    "going backwards": ("", "Lower train.lr, and go back to the best checkpoint; read the samples."),
    "not learning": ("Nothing moves.", "Raise train.lr; read the samples, and check the template that both read."),
    "learning slowly": ("", "Give it more steps; if the curves are smooth, raise train.lr."),
    "cannot tell yet": ("", "Give it more steps; more prompts in data.dev narrow its intervals."),
}


# --- where it goes ----------------------------------------------------------------------------------------------------


def verdict(run: Run) -> Verdict:
    """The verdict on a run, finished or not."""
    figure, told = _evaluated(run)
    aim, aimed = _aimed(run)
    evidence = [*told, *aimed]
    if (overlap := course(run, "overlap/ratio")) is not None:
        evidence.append(str(overlap))
    if not evidence:
        evidence.append(f"{len(run.steps)} steps are recorded, and no evaluation to compare")
    answer = _answer(run, figure, aim)
    why, remedy = DEFAULT.get(answer, ("", ""))
    reason = str(run.summary.get("reason") or "")
    if reason.startswith("collapse"):
        return Verdict("going backwards", tuple(evidence), f"Stopped: {reason}.")
    for cause in CAUSES if answer not in ("learning", "cannot tell yet") else ():
        seen = [sign.seen(run) for sign in cause.signs]
        if all(seen):
            evidence += [text for text in seen if text]
            why, remedy = cause.why, cause.remedy
            break
    return Verdict(answer, tuple(dict.fromkeys(evidence)), why, remedy)


def _answer(run: Run, figure: int | None, aim: Course | None) -> Answer:
    """`figure`: -1, 0 or 1 as the evaluation moved beyond chance; None where it was not measured twice."""
    if figure:
        return "learning" if figure > 0 else "going backwards"
    if aim is None:
        return "cannot tell yet"
    if not aim.sure:
        return "not learning" if len(run.steps) >= ENOUGH else "cannot tell yet"
    if aim.change * dict(AIMS)[aim.key] < 0:
        return "going backwards"
    far = abs(aim.change) >= SMALL * abs(aim.first)
    return "learning" if far and figure is None else "learning slowly"


def _aimed(run: Run) -> tuple[Course | None, list[str]]:
    found = next((c for key, _ in AIMS if (c := course(run, key)) is not None), None)
    return found, [str(found)] if found else []


def _evaluated(run: Run) -> tuple[int | None, list[str]]:
    """Which way the main figure went, beyond chance; and in words. A fall from its best counts as a fall."""
    name = run.headline() or ""
    known = [(step, line[name]) for step, line in run.evals.items() if name in line]
    if len(known) < 2:
        return None, []
    up = -1 if name.rpartition("/")[2] in LOWER_IS_BETTER else 1
    (first, before), (last, after) = known[0], known[-1]
    best_step, best = max(known, key=lambda one: up * one[1].value)
    if _beyond(best, after) and best_step not in (first, last):
        return -1, [f"{_named(name)} {_figure(best, name)} at step {best_step} → {_figure(after, name)} at step {last}"]
    moved = up * (after.value - before.value)
    way = (1 if moved > 0 else -1) if _beyond(before, after) else 0
    chance = "" if way else ", within chance"
    return way, [f"{_named(name)} {_figure(before, name)} → {_figure(after, name)} (steps {first} → {last}{chance})"]


def _beyond(a: Estimate, b: Estimate) -> bool:
    """Whether two estimates differ by more than their intervals explain; without intervals, by a tenth."""
    if a.low is None or a.high is None or b.low is None or b.high is None:
        return abs(b.value - a.value) > 0.1 * max(abs(a.value), abs(b.value))
    half = hypot(a.high - a.low, b.high - b.low) / 2
    return abs(b.value - a.value) > half


def _named(name: str) -> str:
    return name.replace("_", " ").replace("/", " ")


def _figure(value: Estimate, name: str) -> str:
    return number(value.value, any(word in name for word in ("accuracy", "share", "pass_at", "score")))
