"""What goes wrong in a run, noticed while it runs: warnings with cause and remedy, and a collapse, which stops it.

Nothing here holds a tensor or a model. What is remembered is plain data and is saved with the checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

WINDOW = 10  # steps a number must stand out before it is worth a warning
AGAIN = 100  # steps before the same warning may come again
MEMORY = 0.8  # of the smoothed accuracy of the critic: the last five steps or so


@dataclass
class Watchdog:
    """Running sums of a few metrics. Its state is plain data and is saved with the checkpoint."""

    recent: dict[str, list[float]] = field(default_factory=dict)
    said: dict[str, int] = field(default_factory=dict)
    first_entropy: float | None = None
    steps: int = 0

    def look(self, stats: Mapping[str, float]) -> Iterator[tuple[str, str]]:
        """Warnings that this step's numbers give rise to: what is seen, and what to do about it."""
        self.steps += 1
        for name, value in stats.items():
            if name in _WATCHED:
                self.recent[name] = [*self.recent.get(name, [])[-(WINDOW - 1) :], value]
        if self.first_entropy is None and "entropy/student_nats" in stats:
            self.first_entropy = stats["entropy/student_nats"]
        for name, (bad, message, remedy) in _RULES.items():
            values = self.recent.get(name, [])
            mean = sum(values) / len(values) if values else 0.0
            if (
                len(values) == WINDOW
                and bad(mean, self)
                and self.steps - self.said.get(name + message, -AGAIN) >= AGAIN
            ):
                self.said[name + message] = self.steps
                yield message.format(mean), remedy

    def collapsed(self) -> str | None:
        """Why the run should stop: two signs of a collapse over the last steps. One alone can be what is wanted."""
        signs = []
        for name, (bad, message) in _SIGNS.items():
            values = self.recent.get(name, [])
            if len(values) == WINDOW and bad(mean := sum(values) / WINDOW, self):
                signs.append(message.format(mean))
        if len(signs) < 2:
            return None
        return f"collapse, by two signs over the last {WINDOW} steps: {'; '.join(signs)}. {REMEDY}"


REMEDY = "Lower train.lr, raise the KL to the reference, or let the critic learn alone for longer"
_SIGNS: dict[str, tuple[Callable[[float, Watchdog], bool], str]] = {
    "length/truncated_share": (lambda m, _: m > 0.5, "{:.0%} of the answers do not end"),
    "length/ratio": (lambda m, _: m < 0.5 or m > 2, "answers are {:.2f} times as long as the teacher's"),
    "entropy/student_nats": (
        lambda m, w: w.first_entropy is not None and (m < 0.05 * w.first_entropy or m > 3 * w.first_entropy + 0.5),
        "the student's entropy is {:.3f} nats, far from where it began",
    ),
}


def fallen(name: str, value: float, best: float, prompts: float, share: float) -> str | None:
    """Why a run should stop after an evaluation: a share of right answers fell below `share` of its best.

    A fall that so few prompts could show by chance (three standard errors of the best) is none.
    """
    error = (max(best * (1 - best), 0.0) / max(prompts, 1.0)) ** 0.5
    if value >= share * best or best - value <= 3 * error:
        return None
    return f"collapse: {name} is {value:.3f}, less than {share:.0%} of the {best:.3f} that it was. {REMEDY}"


def smoothed(before: float | None, now: float) -> float:
    """The critic's accuracy on fresh pairs, over the last steps."""
    return now if before is None else MEMORY * before + (1 - MEMORY) * now


def paced(accuracy: float | None, band: tuple[float, float] | None) -> tuple[bool, bool]:
    """Whether the student waits, and whether the critic rests.

    Below the band the critic cannot tell teacher from student, and its scores would teach noise: it learns alone.
    Above the band it is far ahead, and a margin that grows further only makes the scores coarse: it rests.
    """
    if accuracy is None or band is None:
        return False, False
    return accuracy < band[0], accuracy > band[1]


_WATCHED = {
    "critic/accuracy",
    "length/ratio",
    "length/truncated_share",
    "group/degenerate_share",
    "entropy/student_nats",
    "critic/length_only_accuracy",
    "critic/student_waits",
    "mismatch/outside_share",
    "clip/positive_stopped_share",
    "text/repeating_share",
}
_RULES: dict[str, tuple[Callable[[float, Watchdog], bool], str, str]] = {
    "length/truncated_share": (
        lambda m, _: m > 0.1,
        "{:.0%} of the student's answers hit speak.max_tokens",
        "raise speak.max_tokens, or leave out prompts with long answers; a judge sees truncation, not quality",
    ),
    "group/degenerate_share": (
        lambda m, _: m > 0.8,
        "in {:.0%} of the groups all answers earn the same, so they teach nothing",
        "raise the group or speak.temperature, or choose prompts of middling difficulty",
    ),
    "critic/accuracy": (
        lambda m, _: m > 0.97,
        "the critic tells teacher from student in {:.0%} of pairs: it may read a surface mark",
        "look at the samples for a mark (length, format, an end); lower critic.lr or set critic.score_l2",
    ),
    "length/ratio": (
        lambda m, _: m > 1.3 or m < 0.7,
        "the student's answers are {:.2f} times as long as the teacher's",
        "critics can reward length: keep the best inside eval.length_band, or lower train.lr",
    ),
    "entropy/student_nats": (
        lambda m, w: w.first_entropy is not None and m < 0.1 * w.first_entropy,
        "the student's entropy fell to {:.3f} nats, a tenth of where it began",
        "lower train.lr, raise the KL to the reference, or stop here and keep the best",
    ),
    "critic/length_only_accuracy": (
        lambda m, _: m > 0.85,
        "length alone tells teacher from student in {:.0%} of pairs",
        "warm up longer, so that lengths agree before the critic is obeyed",
    ),
    "critic/student_waits": (
        lambda m, _: m > 0.8,
        "in {:.0%} of the steps the student waited: the critic could not tell it from the teacher (accuracy_band)",
        "where the samples are good, stop: the critic has no more to teach; else raise critic.lr or critic.steps",
    ),
    "mismatch/outside_share": (
        lambda m, _: m > 0.02,
        "{:.1%} of the tokens are twice as likely to the engine that speaks as to the trainer, or half",
        "give both the same precision, sampling settings and weights, or mask such tokens with a band gate",
    ),
    "clip/positive_stopped_share": (
        lambda m, _: m > 0.5,
        "the clip stops {:.0%} of the tokens that should become likelier",
        "anchor at the old student, widen the clip's upper side, or lower train.updates and train.passes",
    ),
    "text/repeating_share": (
        lambda m, _: m > 0.05,
        "{:.0%} of the answers repeat themselves",
        "read the longest samples; lower train.lr, add a KL to the reference, mix in recorded answers",
    ),
}
