"""Divergences in symbols: what `match` pulls the student's distribution onto the judge's with.

    Divergence("jsd", (("beta", 0.5),), temperature=2.0)      a function of opd.math.divergence, and its arguments
    support=Support("teacher", 64, "tail")                     on part of the vocabulary
    cap=0.05                                                   no vocabulary entry counts for more

The functions below are the truncated objectives that were published, under the names they are known by. They differ in
what they converge to, and only some converge to the teacher: docs/sparse.md has the table, a test holds it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from opd import math
from opd.types import Says

if TYPE_CHECKING:
    from torch import Tensor

    from opd.expression import Whole
    from opd.loss import Tile
    from opd.types import Judge

Whose = Literal["teacher", "student", "union"]
Rest = Literal["dropped", "renormalised", "teacher_renormalised", "tail"]


@dataclass(frozen=True)
class Support:
    """The `k` likeliest tokens of the teacher, the student or either, and what becomes of the rest (`math.support`)."""

    whose: Whose
    k: int
    rest: Rest = "tail"

    def __str__(self) -> str:
        whose = "teacher's or student's" if self.whose == "union" else f"{self.whose}'s"
        rest = {
            "dropped": "the rest dropped",
            "renormalised": "both renormalised",
            "teacher_renormalised": "the teacher renormalised",
            "tail": "the rest as one",
        }[self.rest]
        return f"{whose} top {self.k}, {rest}"


@dataclass(frozen=True)
class Divergence:
    """A function of `opd.math.divergence` with its arguments.

    `temperature` divides both sides' logits before it, `tau_squared` multiplies what comes out by its square (Hinton's
    distillation: the gradient then keeps its size). `support` says which tokens it is summed over. `cap` bounds every
    vocabulary entry from above (OPSD): entries may be negative, so the sum may be too.
    """

    name: str
    args: tuple[tuple[str, float | str], ...] = ()
    temperature: float = 1.0
    support: Support | None = None
    cap: float | None = None
    tau_squared: bool = False

    @property
    def asks(self) -> Says:
        """What it must know of the teacher: its likeliest tokens, where only they are compared; else all."""
        return Says.TOP if self.support is not None and self.support.whose == "teacher" else Says.DENSE

    def entries(self, s_nV: Tensor, t_nV: Tensor) -> Tensor:
        """[n, V] (or [n, K] on a support) whose sum is the divergence; both arguments already at `temperature`."""
        if self.support is not None:
            s_nV, t_nV = math.support.cut(s_nV, t_nV, **asdict(self.support))
        return self._between(s_nV, t_nV)

    def entries_at(self, s_nV: Tensor, ids_nK: Tensor, t_nK: Tensor) -> Tensor:
        """The same [n, K], where of the teacher only its likeliest tokens are known, and no others are compared."""
        assert self.support is not None and self.asks is Says.TOP
        return self._between(*math.support.cut_at(s_nV, ids_nK, t_nK, self.support.rest))

    def _between(self, s_nV: Tensor, t_nV: Tensor) -> Tensor:
        fn: Callable[..., Tensor] = getattr(math.divergence, self.name)
        entries_nV = fn(s_nV, t_nV, **dict(self.args))
        if self.cap is not None:
            entries_nV = entries_nV.clamp(max=self.cap)
        return self.temperature**2 * entries_nV if self.tau_squared else entries_nV

    def between(self, tile: Tile, judge: Judge) -> Tensor:
        """[n] the divergence at each token of a tile."""
        if self.support is not None and self.asks is Says.TOP:
            top = tile.top(judge, self.support.k, self.temperature)
            return self.entries_at(tile.student(self.temperature), *top).sum(-1)
        return self.entries(tile.student(self.temperature), tile.distribution(judge, self.temperature)).sum(-1)

    def counted(self, scope: Whole, judge: Judge) -> Tensor | None:
        """[N] at which tokens it has a value; None: at all."""
        return None

    def __str__(self) -> str:
        inside = [_argument(name, given) for name, given in self.args if given is not False]
        if self.temperature != 1:
            inside.append(f"temperature={self.temperature:g}")
        if self.cap is not None:
            inside.append(f"entries <= {self.cap:g}")
        if self.support is not None:
            inside.append(str(self.support))
        name = f"{self.name}({', '.join(inside)})" if inside else self.name
        return f"{self.temperature:g}^2 {name}" if self.tau_squared and self.temperature != 1 else name


class Distance(Protocol):
    """What a `match` makes small: a `Divergence`, or what `opd.spans` has for a judge with another tokenizer."""

    @property
    def temperature(self) -> float:
        """Divides both sides' logits."""

    @property
    def asks(self) -> Says:
        """What it must know of the judge."""

    def between(self, tile: Tile, judge: Judge) -> Tensor:
        """[n] its value at each token of a tile."""

    def counted(self, scope: Whole, judge: Judge) -> Tensor | None:
        """[N] at which tokens it has a value; None: at all."""


def _argument(name: str, given: float | str) -> str:
    if given is True:
        return name
    return f"{name}={given}" if isinstance(given, str) else f"{name}={given:g}"


# --- the truncated objectives that were published ---------------------------------------------------------------------
# K: what is kept, P_K and Q_K the teacher's and student's mass on it. "Converges to": where its gradient is zero for a
# fixed K, and the student is free to be anything.


def verl(k: int = 32) -> Divergence:
    """verl's `forward_kl_topk` (NeMo-RL's forward): sum over the teacher's top k of p log(p / q), as they are.

    Converges to p / P_K on K and 0 elsewhere: a sharpened teacher.
    """
    return Divergence("forward_kl", support=Support("teacher", k, "dropped"))


def eopd(k: int = 16) -> Divergence:
    """EOPD (arXiv 2603.07079): forward KL on the teacher's top k, the teacher renormalised, the student not.

    Converges where `verl` does, to p / P_K on K and 0 elsewhere: the two differ by a factor and a constant.
    """
    return Divergence("forward_kl", support=Support("teacher", k, "teacher_renormalised"))


def opcd(k: int = 256) -> Divergence:
    """OPCD (arXiv 2602.12275, its code): reverse KL on the student's top k, as they are.

    Does not converge to the teacher: mass is pushed out of K, until q = p / e there and the loss is -P_K / e. With K
    chosen anew each step and all but all of the mass in it, this is hardly felt.
    """
    return Divergence("reverse_kl", support=Support("student", k, "dropped"))


def nemo(k: int = 64) -> Divergence:
    """NeMo-RL's reverse: reverse KL on the teacher's top k, as they are. Converges where `opcd` does, to p / e on K."""
    return Divergence("reverse_kl", support=Support("teacher", k, "dropped"))


def lsm(k: int = 32) -> Divergence:
    """Local support matching (arXiv 2603.25562): reverse KL on the teacher's top k, both renormalised.

    Converges to the teacher's conditionals on K; how much mass lies on K is not taught at all.
    """
    return Divergence("reverse_kl", support=Support("teacher", k, "renormalised"))


def rethinking(k: int = 16) -> Divergence:
    """Rethinking OPD (arXiv 2604.13016), as printed: reverse KL on the student's top k, both renormalised.

    Converges to the teacher's conditionals on K; how much mass lies on K is not taught at all.
    """
    return Divergence("reverse_kl", support=Support("student", k, "renormalised"))


def thunlp(k: int = 16) -> Divergence:
    """Rethinking OPD, as its code does it: each of the student's top k pushed by its own log-ratio, weighed by q / Q_K.

    Converges to q = p on K, mass included. (The first of several updates on one batch: no ratio, no clip.)
    """
    return Divergence("weighed_reverse_kl", support=Support("student", k, "dropped"))


def openclaw(k: int = 50) -> Divergence:
    """OpenClaw-RL's top-k variant: reverse KL on the teacher's top k and a bucket for the rest.

    Converges to q = p on K and as much mass on the rest as the teacher's: right, whatever k is.
    """
    return Divergence("reverse_kl", support=Support("teacher", k, "tail"))


def sdft(alpha: float = 0.5, k: int = 100, *, tail: bool = True) -> Divergence:
    """SDFT (arXiv 2601.19897, TRL's code): generalized JSD on the student's top k; alpha 0 forward, 1 reverse KL.

    With the bucket it converges to q = p on K and equal mass on the rest; without, to the conditionals on K.
    """
    return _jsd(alpha, Support("student", k, "tail" if tail else "renormalised"))


def trl(beta: float = 0.5, k: int = 64, *, tail: bool = True) -> Divergence:
    """TRL's distillation trainers: generalized JSD; the teacher's top k at beta 0, the student's at 1, else of either.

    With the bucket it converges to q = p on K and equal mass on the rest; without, to the conditionals on K.
    """
    whose: Whose = "teacher" if beta == 0 else "student" if beta == 1 else "union"
    return _jsd(beta, Support(whose, k, "tail" if tail else "renormalised"))


def opsd_top_k(k: int, beta: float = 0.5) -> Divergence:
    """OPSD's `top_k_loss`: generalized JSD on the teacher's top k, both renormalised. Converges where `lsm` does."""
    return _jsd(beta, Support("teacher", k, "renormalised"))


def _jsd(beta: float, support: Support) -> Divergence:
    if beta in (0, 1):
        return Divergence("forward_kl" if beta == 0 else "reverse_kl", support=support)
    return Divergence("jsd", (("beta", beta),), support=support)
