"""Credits: how good a sampled token was. `push` raises the token by its credit."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from opd import math
from opd.anchors import Against, Logp
from opd.expression import Expression, Reach, Scope, Whole
from opd.schedule import Coefficient, Schedule, value
from opd.types import RETOKENIZED, Judge, Needs, Says

if TYPE_CHECKING:
    from torch import Tensor

Combine = Literal["mean", "minimum", "lower_bound"]


@dataclass(frozen=True)
class LogRatio(Expression):
    """log judge - log student on the sampled token, in nats."""

    judge: Judge
    against: Against

    def at(self, scope: Scope) -> Tensor:
        mine: Tensor = getattr(scope, self.against)
        return scope.judged(self.judge) - mine.detach()

    @property
    def own_needs(self) -> Needs:
        return {self.judge: Says.TOKEN}

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({self.against})

    def __str__(self) -> str:
        return f"log {self.judge} - {Logp(self.against)}"


@dataclass(frozen=True)
class SpanRatio(Expression):
    """log judge - log student of the whole span of text that a token stands in, for a judge with another tokenizer."""

    judge: Judge
    against: Against
    reach = Reach.SEQUENCE

    def at(self, scope: Whole) -> Tensor:
        mine: Tensor = getattr(scope, self.against)
        return math.align.totals(scope.judged(self.judge) - mine.detach(), scope.alignment(self.judge).span_N)

    def counted(self, scope: Whole) -> Tensor:
        return scope.alignment(self.judge).inside_N

    @property
    def own_needs(self) -> Needs:
        return {self.judge: Says.TOKEN}

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({self.against})

    def __str__(self) -> str:
        return f"Σ_span (log {self.judge} - {Logp(self.against)})"


@dataclass(frozen=True)
class Reward(Expression):
    """A rollout's reward (the task's, or a critic's score) less its group's mean, over the deviation if `std`."""

    judge: Judge | None = None
    std: bool = False
    min_std: float = 0.0
    combine: Combine = "mean"
    width: float = 1.0
    reach = Reach.GROUP

    def at(self, scope: Whole) -> Tensor:
        value_B = scope.reward
        if self.judge is not None:
            value_B = math.credit.combined(scope.scored(self.judge), scope.group, self.combine, self.width)
        advantage_B = math.credit.group_advantage(value_B, scope.group, std=self.std, min_std=self.min_std)
        return advantage_B[scope.row]

    @property
    def own_needs(self) -> Needs:
        return {} if self.judge is None else {self.judge: Says.SCORE}

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"reward"}) if self.judge is None else frozenset()

    def __str__(self) -> str:
        name = "reward" if self.judge is None else f"score_{self.judge}"
        if self.combine != "mean":
            width = f"{self.width:g} " if self.combine == "lower_bound" else ""
            name = {"minimum": f"min {name}", "lower_bound": f"(mean - {width}std of {name})"}[self.combine]
        return f"({name} - group mean)" + (" / group std" if self.std else "")


@dataclass(frozen=True)
class Outcome(Expression):
    """A rollout's reward as it is, for every token of it: no group, no baseline."""

    reach = Reach.SEQUENCE

    def at(self, scope: Whole) -> Tensor:
        return scope.reward[scope.row]

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"reward"})

    def __str__(self) -> str:
        return "reward"


@dataclass(frozen=True)
class Discounted(Expression):
    """sum_k gamma^k credit_{t+k}, the token itself included."""

    inner: Expression
    gamma: float
    parts = ("inner",)
    reach = Reach.SEQUENCE

    def at(self, scope: Whole) -> Tensor:
        return math.credit.discounted(self.inner.value(scope), scope.row, self.gamma)

    def __str__(self) -> str:
        return f"Σ_k {self.gamma:g}^k ({self.inner})_t+k"


@dataclass(frozen=True)
class Evident(Expression):
    """credit * [(1 - share) + share * clip((judge / student)^sign(credit), 1 - eps, 1 + eps)]: its sign stays."""

    inner: Expression
    evidence: Expression
    share: Coefficient
    eps: float
    parts = ("inner", "evidence")

    def at(self, scope: Scope) -> Tensor:
        credit_N, evidence_N = self.inner.value(scope), self.evidence.value(scope)
        return math.credit.evident(credit_N, evidence_N, value(self.share, scope.step), self.eps)

    def __str__(self) -> str:
        share = str(self.share) if isinstance(self.share, Schedule) else f"{self.share:g}"
        return f"({self.inner}) · (1 + {share} (clip[±{self.eps:g}](exp(±({self.evidence}))) - 1))"


@dataclass(frozen=True)
class Future(Expression):
    """The credits of the tokens after this one: their mean, or their sum. Of the last token 0."""

    inner: Expression
    mean: bool
    parts = ("inner",)
    reach = Reach.SEQUENCE

    def at(self, scope: Whole) -> Tensor:
        return math.credit.future(self.inner.value(scope), scope.row, mean=self.mean)

    def __str__(self) -> str:
        return f"{'mean' if self.mean else 'Σ'}_k>t ({self.inner})_k"


@dataclass(frozen=True)
class PerRemaining(Expression):
    """A credit over the number of tokens left in its row, itself included."""

    inner: Expression
    parts = ("inner",)
    reach = Reach.SEQUENCE

    def at(self, scope: Whole) -> Tensor:
        return self.inner.value(scope) / math.credit.remaining(scope.row, self.inner.value(scope).dtype)

    def __str__(self) -> str:
        return f"({self.inner}) / (T - t + 1)"


@dataclass(frozen=True)
class Whitened(Expression):
    """A credit less its mean, over its deviation: both of all tokens of one speaker in the optimizer batch."""

    inner: Expression
    speaker: str
    parts = ("inner",)
    reach = Reach.BATCH

    def at(self, scope: Whole) -> Tensor:
        own_N = scope.spoken_by(self.speaker)[scope.row]
        return math.credit.whitened(self.inner.value(scope), own_N, scope.total)

    def __str__(self) -> str:
        return f"whitened({self.inner})"


@dataclass(frozen=True)
class Bounded(Expression):
    """A credit held between two numbers."""

    inner: Expression
    low: float
    high: float
    parts = ("inner",)

    def at(self, scope: Scope) -> Tensor:
        return self.inner.value(scope).clamp(self.low, self.high)

    def __str__(self) -> str:
        return f"bounded({self.inner}, {self.low:g}, {self.high:g})"


@dataclass(frozen=True)
class Preference(Expression):
    """The weight that DPO gives to a row, + for a good and - for a bad one: beta * sigmoid(-z), the mean over pairs.

    z = beta * (sum_t log student/reference of the good row - that of the bad row); a pair answers one prompt.
    """

    good: str
    bad: str
    reference: Judge
    beta: float
    reach = Reach.GROUP

    def at(self, scope: Whole) -> Tensor:
        z_BB, pair_BB = self._pairs(scope)
        return math.credit.preference(z_BB, pair_BB, self.beta)[scope.row]

    def measures(self, scope: Whole) -> dict[str, Tensor]:
        z_BB, pair_BB = self._pairs(scope)
        return math.credit.dpo(z_BB, pair_BB)

    def _pairs(self, scope: Whole) -> tuple[Tensor, Tensor]:
        gain_N = scope.live.detach() - scope.judged(self.reference)
        good_B, bad_B = scope.spoken_by(self.good), scope.spoken_by(self.bad)
        return math.credit.margins(self.beta * gain_N, scope.row, scope.prompt, good_B, bad_B)

    @property
    def own_needs(self) -> Needs:
        return {self.reference: Says.TOKEN}

    @property
    def own_reads(self) -> frozenset[str]:
        return frozenset({"live"})

    def __str__(self) -> str:
        z = f"z = {self.beta:g} Σ_t(log π - log {self.reference})"
        return f"DPO: ±{self.beta:g} σ(-z), {z} of {self.good} less that of {self.bad}"


def log_ratio(judge: Judge, against: Against = "live") -> Expression:
    """log judge - log student on the sampled token; needs TOKEN. Pushed on-policy it has the reverse KL's gradient.

    Of a judge that reads the text retokenized: of the span of text that the token stands in, by the chain rule.
    """
    return SpanRatio(judge, against) if judge.view == RETOKENIZED else LogRatio(judge, against)


def reward(
    judge: Judge | None = None,
    *,
    std: bool = False,
    min_std: float = 0.0,
    combine: Combine = "mean",
    width: float = 1.0,
) -> Expression:
    """Group-centred reward from the task's verifier, or from a critic; `combine` is for several critics."""
    return Reward(judge, std, min_std, combine, width)


def outcome() -> Expression:
    """The reward itself, not compared with its group: for rewards whose sign means something, such as +1 and -1."""
    return Outcome()


def discounted(credit: Expression, gamma: float) -> Expression:
    """Reward-to-go of a credit; gamma = 0 is the credit itself."""
    return Discounted(credit, gamma) if gamma else credit


def evident(credit: Expression, evidence: Expression, share: Coefficient, eps: float) -> Expression:
    """A credit whose size follows a log-ratio and whose sign stays; with a share of 0 the log-ratio is not asked."""
    return credit if share == 0 else Evident(credit, evidence, share, eps)


def future(credit: Expression, *, mean: bool) -> Expression:
    """What comes after a token: MiniLLM's R_{t+1}, its mean (length-normalised) or its sum."""
    return Future(credit, mean)


def per_remaining(credit: Expression) -> Expression:
    """A reward-to-go over the number of tokens that it sums."""
    return PerRemaining(credit)


def whitened(credit: Expression, speaker: str = "student") -> Expression:
    """Mean 0 and deviation 1 over all tokens of a speaker, in the whole optimizer batch and on all ranks."""
    return Whitened(credit, speaker)


def bounded(credit: Expression, low: float, high: float) -> Expression:
    """A credit that cannot leave [low, high]."""
    return Bounded(credit, low, high)


def preference(good: str, bad: str, reference: Judge, *, beta: float) -> Expression:
    """DPO as a credit: pushed with the anchor `live()`, per sequence_sum, on the good rows and on the bad rows, it has
    the gradient of -log sigmoid(z)."""
    return Preference(good, bad, reference, beta)
