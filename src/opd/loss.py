"""The algebra: a loss is a sum of terms, written in symbols and evaluated where the tensors are.

    loss_t = gate_t * [ sum_k c_k D_k(judge_k, student)  -  min(r_t a_t, clip(r_t) a_t) ],   a_t = weight_t * credit_t

    match(judge, divergence)      pull the student's distribution onto the judge's
    push(credit, anchor, clip)    raise or lower the sampled token by its credit, inside a trust region
    nll()                         the sampled token is itself the target
    k3(judge)                     the papers' KL penalty, with the gradient it really has
    layers(judge, pairs, kind)    pull the student's hidden states onto the judge's, through a map that learns
    learn(critic, objective)      a critic learns; its need of the teacher's text is derived like any other

    loss + loss, 0.1 * loss, loss.on(speaker), loss.where(gate), loss.per("sequence")

What the loss needs from whom (`needs`) and which log-probabilities it reads (`reads`) follow from the symbols. Nothing
here imports torch: the command line prints equations without it. `opd.divergences` has what `match` takes;
`opd.credits`, `opd.anchors` and `opd.gates` have what enters a `push` and a `where`: all are `Expression`s, and the
door they enter by gives them their role.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from opd import math
from opd.anchors import Logp, behaviour, live
from opd.divergences import Distance, Divergence
from opd.expression import Expression, Scope, Whole, union
from opd.layered import Kind, Layers, Pairs
from opd.schedule import Coefficient, Schedule
from opd.types import Judge, Needs, Says

if TYPE_CHECKING:
    from torch import Tensor

    from opd.aligned import Crossed, Pairing

Per = Literal["token", "sequence", "sequence_sum"]


# --- heads: what one term does with a token ---------------------------------------------------------------------------


class Tile(Scope, Protocol):
    """The scope of some tokens with the vocabulary axis; gradient flows through `live` and `student`."""

    @property
    def target(self) -> Tensor:
        """[n] log-probability of the sampled token at temperature 1, for nll."""

    def student(self, temperature: float) -> Tensor:
        """[n, V] the student's log-probabilities at this temperature."""

    def distribution(self, judge: Judge, temperature: float) -> Tensor:
        """[n, V] the judge's."""

    def top(self, judge: Judge, k: int, temperature: float) -> tuple[Tensor, Tensor]:
        """[n, K] ids of the judge's `k` likeliest tokens, and their log-probabilities."""

    def crossed(self, judge: Judge, temperature: float, by: Pairing) -> Crossed:
        """The student's beside those of a judge with another tokenizer, span by span or place by place."""


@dataclass(frozen=True)
class Match:
    """sum_v D(judge, student) at each token, in nats. Gradient through the student's distribution only."""

    judge: Judge
    divergence: Distance

    def at(self, tile: Tile) -> Tensor:
        return self.divergence.between(tile, self.judge)

    @property
    def expressions(self) -> tuple[Expression, ...]:
        return ()

    needs: ClassVar[Any] = property(lambda self: {self.judge: self.divergence.asks})

    def __str__(self) -> str:
        return f"{self.divergence}({self.judge}, π)"


@dataclass(frozen=True)
class Push:
    """-min(r a, clip(r) a) at each sampled token, r = student / anchor. Gradient through `live` in r only."""

    credit: Expression
    anchor: Expression
    clip: tuple[float, float] | None

    def at(self, tile: Tile) -> Tensor:
        return math.trust.surrogate(self.anchor.log_ratio(tile.live, tile), self.credit.value(tile).detach(), self.clip)

    @property
    def expressions(self) -> tuple[Expression, ...]:
        return (self.credit, self.anchor)

    needs: ClassVar[Any] = property(lambda self: {})

    def __str__(self) -> str:
        ratio = f"exp(log π - {self.anchor})" if isinstance(self.anchor, Logp) else f"π / anchor[{self.anchor}]"
        ratio = "log π" if self.anchor == live() else ratio  # a ratio of 1, with the gradient of log π
        inside = f"{ratio} · [{self.credit}]"
        return f"-{inside}" if self.clip is None else f"-clip[-{self.clip[0]:g}, +{self.clip[1]:g}]({inside})"


@dataclass(frozen=True)
class Nll:
    """-log student of the token that was sampled, at temperature 1, in nats."""

    def at(self, tile: Tile) -> Tensor:
        return -tile.target

    expressions: ClassVar[tuple[Expression, ...]] = ()
    needs: ClassVar[Any] = property(lambda self: {})

    def __str__(self) -> str:
        return "-log π(y)"


@dataclass(frozen=True)
class K3:
    """exp(d) - d - 1, d = log judge - log student, on the sampled token: a value with the *forward* KL's gradient."""

    judge: Judge

    def at(self, tile: Tile) -> Tensor:
        return math.trust.k3(tile.live, tile.judged(self.judge))

    expressions: ClassVar[tuple[Expression, ...]] = ()
    needs: ClassVar[Any] = property(lambda self: {self.judge: Says.TOKEN})

    def __str__(self) -> str:
        return f"k3({self.judge}, π)"


@dataclass(frozen=True)
class Learn:
    """A critic's own objective over pairs of rollouts. No gradient reaches the student; none anyone if `fixed`."""

    judge: Judge
    objective: Objective
    fixed: bool = False
    expressions: ClassVar[tuple[Expression, ...]] = ()

    needs: ClassVar[Any] = property(lambda self: {Judge(self.objective.good): Says.TEXT})

    def __str__(self) -> str:
        return f"{'fixed' if self.fixed else 'learn'}({self.judge}: {self.objective})"


@dataclass(frozen=True)
class Objective:
    """What a critic minimises over pairs of a `good` and a `bad` speaker's text for the same prompt.

    With `critics` above 1 so many do, each by itself.
    """

    kind: Literal["bradley_terry", "bce"]
    good: str
    bad: str
    critics: int = 1

    def __str__(self) -> str:
        each = f" for each of {self.critics}" if self.critics > 1 else ""
        if self.kind == "bradley_terry":
            return f"-log σ(D({self.good}) - D({self.bad})){each}"
        return f"-log σ(D({self.good})) - log(1 - σ(D({self.bad}))){each}"


Head = Match | Push | Nll | K3 | Layers | Learn


# --- terms and their sum ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """One head with its coefficient, gates, rows and mean."""

    head: Head
    coefficient: Coefficient = 1.0
    gates: tuple[Expression, ...] = ()
    source: str | None = None
    per: Per = "token"

    @property
    def expressions(self) -> tuple[Expression, ...]:
        return (*self.head.expressions, *self.gates)

    @property
    def needs(self) -> Needs:
        return union([self.head.needs, *(e.needs for e in self.expressions)])

    @property
    def reads(self) -> frozenset[str]:
        return frozenset().union(*(e.reads for e in self.expressions))

    def at(self, tile: Any) -> Tensor:
        """[n] the term at each token, gates applied, not yet averaged; the scope is what its head reads."""
        assert not isinstance(self.head, Learn), "a critic's objective has no value at the student's tokens"
        value = self.head.at(tile)
        for gate in self.gates:
            value = gate.value(tile).detach() * value
        return value

    def counted(self, scope: Whole) -> list[Tensor]:
        """Masks [N] of the tokens at which the term has a value; it counts, and is averaged over, those in all."""
        made = [e.counted(scope) for outer in self.expressions for e in outer.every()]
        if isinstance(self.head, Match):
            made.append(self.head.divergence.counted(scope, self.head.judge))
        return [mask for mask in made if mask is not None]

    @property
    def name(self) -> str:
        head = self.head
        match head:
            case Match():
                return f"match_{head.judge.role}"
            case Push():
                says = ["reward"] * ("reward" in head.credit.reads) + [j.role for j in head.credit.needs]
                return "push_" + "_".join(dict.fromkeys(says))
            case Nll():
                return "nll"
            case K3():
                return f"k3_{head.judge.role}"
            case Layers():
                return f"layers_{head.judge.role}"
            case Learn():
                return f"learn_{head.judge.role}"

    def __str__(self) -> str:
        body = " · ".join([*(str(g) for g in self.gates), str(self.head)])
        if isinstance(self.head, Learn):
            return body
        unit = getattr(self.head.divergence, "unit", "t") if isinstance(self.head, Match) else "t"
        mean = {"token": f"mean_{unit}", "sequence": f"mean_y mean_{unit}", "sequence_sum": f"mean_y Σ_{unit}"}[
            self.per
        ]
        where = f" over {self.source} rows" if self.source else ""
        factor = "" if self.coefficient == 1.0 else f"{self.coefficient} · "
        return f"{factor}{mean}[{body}]{where}"


@dataclass(frozen=True)
class Loss:
    """A sum of terms, each averaged over its own tokens, so that terms never dilute each other."""

    terms: tuple[Term, ...]

    @property
    def needs(self) -> Needs:
        """What has to be heard: for each judge, the most that any term asks."""
        return union(t.needs for t in self.terms)

    @property
    def reads(self) -> frozenset[str]:
        return frozenset().union(*(t.reads for t in self.terms))

    def tops(self, judge: Judge) -> frozenset[tuple[int, float]]:
        """How many of a judge's likeliest tokens terms compare that compare no others, and at what temperature."""
        own = [t.head.divergence for t in self.terms if isinstance(t.head, Match) and t.head.judge == judge]
        tops = [d for d in own if isinstance(d, Divergence) and d.asks is Says.TOP]
        return frozenset((d.support.k, d.temperature) for d in tops if d.support is not None)

    @property
    def depths(self) -> dict[Judge, tuple[int, ...]]:
        """The layers that are read of each judge."""
        heads = [t.head for t in self.terms if isinstance(t.head, Layers)]
        return {
            j: tuple(sorted({d for h in heads if h.judge == j for _, d in h.pairs})) for j in {h.judge for h in heads}
        }

    @property
    def token_terms(self) -> tuple[Term, ...]:
        return tuple(t for t in self.terms if not isinstance(t.head, Learn))

    @property
    def learned(self) -> tuple[Learn, ...]:
        return tuple(t.head for t in self.terms if isinstance(t.head, Learn))

    def _each(self, change: Callable[[Term], Term]) -> Loss:
        return Loss(tuple(change(t) for t in self.terms))

    def __add__(self, other: Loss) -> Loss:
        return Loss(self.terms + other.terms)

    def __rmul__(self, factor: Coefficient) -> Loss:
        """Scale every term; a factor of 0 removes the term and with it what it would have asked."""
        if factor == 0:
            return Loss(())
        return self._each(lambda t: replace(t, coefficient=_times(factor, t.coefficient)))

    def on(self, source: str) -> Loss:
        """Only rows that this speaker spoke, and only they are counted."""
        return self._each(lambda t: replace(t, source=source))

    def where(self, gate: Expression) -> Loss:
        """Multiply by a gate; gated tokens still count in the mean."""
        if {"live", "old"} & gate.reads and any(isinstance(t.head, Layers) for t in self.terms):
            raise ValueError(f"a term on hidden states has no probabilities to be gated by: {gate}")
        return self._each(lambda t: replace(t, gates=(*t.gates, gate)))

    def per(self, per: Per) -> Loss:
        """Average over tokens; over sequences of their token means; or over sequences of their token sums.

        Where a term has its value once a span (`opd.spans`), read spans for tokens.
        """
        return self._each(lambda t: replace(t, per=per))

    def __str__(self) -> str:
        return " + ".join(str(t) for t in self.terms) or "0"


def match(judge: Judge, divergence: Distance) -> Loss:
    """Pull the student's distribution onto the judge's; needs DENSE, or TOP on a support of the judge's likeliest."""
    return Loss((Term(Match(judge, divergence)),))


def push(credit: Expression, *, anchor: Expression | None = None, clip: tuple[float, float] | None = None) -> Loss:
    """Raise or lower the sampled token by its credit; the anchor is the behaviour unless given."""
    return Loss((Term(Push(credit, anchor or behaviour(), clip)),))


def nll() -> Loss:
    """Cross entropy on the tokens that were spoken."""
    return Loss((Term(Nll()),))


def k3(judge: Judge) -> Loss:
    """The penalty that GRPO and GAD print as KL(student || reference). Its gradient is KL(reference || student)'s."""
    return Loss((Term(K3(judge)),))


def layers(judge: Judge, pairs: Pairs, kind: Kind = "cosine", *, project: bool = True) -> Loss:
    """Pull the student's hidden states onto the judge's, pair by pair of layers; needs LAYERS.

    A pair is (the student's, the judge's): 0 the embeddings, n the states after layer n, -1 the last, after its norm.
    """
    return Loss((Term(Layers(judge, pairs, kind, project)),)) if pairs else Loss(())


def learn(critic: Judge, objective: Objective) -> Loss:
    """Train a critic alongside."""
    return Loss((Term(Learn(critic, objective)),))


def bradley_terry(*, good: str, bad: str) -> Objective:
    """-log sigmoid(D(good) - D(bad)): GAD, arXiv 2511.10643, eq. 3."""
    return Objective("bradley_terry", good, bad)


def bce(*, good: str, bad: str) -> Objective:
    """-log sigmoid(D(good)) - log(1 - sigmoid(D(bad))): the plain GAN of GAD's ablation, eq. 4."""
    return Objective("bce", good, bad)


def _times(a: Coefficient, b: Coefficient) -> Coefficient:
    if isinstance(a, Schedule) and isinstance(b, Schedule):
        raise ValueError(f"a term has two schedules, {a} and {b}: one coefficient can follow only one")
    if isinstance(a, Schedule):
        assert not isinstance(b, Schedule)
        return replace(a, start=a.start * b, end=a.end * b)
    if isinstance(b, Schedule):
        return replace(b, start=a * b.start, end=a * b.end)
    return a * b
