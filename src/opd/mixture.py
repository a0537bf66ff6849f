"""Which prompt comes when: several weighted sources as one endless sequence, by position alone.

Position k of the sequence is a pure function of (seed, weights, sizes), so the whole state of a run's data is one
integer: how many prompts it has had.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from math import gcd, inf, lcm

from opd.errors import UsageError
from opd.types import Prompt

MARK = 1024


class Mixture:
    """Weighted sources, each walked in its own shuffled order, epoch after epoch.

    After any k prompts a source of share w has given c of them with |c - k w| < 1: the mixture is exact over a run, not
    in expectation. Every prompt of a source comes once an epoch; each epoch has another order.

    Weights are relative. A prompt may stand twice in one stretch where a source's epochs meet, or where two sources
    share it: samples of the two are to be numbered apart.

    Raises `UsageError` for a source without prompts, a negative weight, and weights that are all zero.
    """

    def __init__(self, sources: Sequence[Sequence[Prompt]], weights: Sequence[float] | None = None, seed: int = 0):
        weights = [1.0] * len(sources) if weights is None else weights
        if len(weights) != len(sources):
            raise ValueError(f"{len(sources)} sources with {len(weights)} weights")
        problems = [
            f"source {i + 1} of the mixture has the weight {w}" for i, w in enumerate(weights) if not 0 <= w < inf
        ]
        problems += [
            f"source {i + 1} of the mixture has no prompts and the weight {w}"
            for i, (s, w) in enumerate(zip(sources, weights, strict=True))
            if not len(s) and w > 0
        ]
        if not problems and not any(weights):
            problems.append("no source of the mixture has a weight above 0: there is nothing to train on")
        if problems:
            raise UsageError(*problems)
        self.seed = seed
        self.weights = tuple(weights)
        self._parts: dict[frozenset[str], Mixture] = {}
        self.sources = [tuple(s) for s in sources]
        self._shares = _integers(weights)
        self._turns = _Turns(self._shares)
        self._order = lru_cache(maxsize=2 * len(sources))(self._shuffled)  # consecutive positions read few epochs

    @property
    def size(self) -> int:
        """Prompts in the sources that are drawn from: an epoch of the whole, in number."""
        return sum(len(s) for s, share in zip(self.sources, self._shares, strict=True) if share)

    def of(self, domains: Sequence[str] | None) -> Mixture:
        """The prompts of these domains alone, a sequence of its own; None is all. Sources keep their weights.

        Raises `UsageError` for a domain that no prompt is of.
        """
        if domains is None:
            return self
        wanted, known = frozenset(domains), {p.domain for source in self.sources for p in source}
        if lacking := sorted(wanted - known):
            raise UsageError(
                f"no prompt of data.train is of the domain {', '.join(map(repr, lacking))}; there are "
                f"{', '.join(map(repr, sorted(known)))}. A source's `domain` names what its prompts are about"
            )
        if wanted not in self._parts:
            kept = [[p for p in source if p.domain in wanted] for source in self.sources]
            pairs = [(s, w) for s, w in zip(kept, self.weights, strict=True) if s]
            self._parts[wanted] = Mixture([s for s, _ in pairs], [w for _, w in pairs], self.seed)
        return self._parts[wanted]

    def prompts(self, cursor: int, n: int) -> list[Prompt]:
        """The n prompts after the first `cursor`."""
        if cursor < 0 or n < 0:
            raise ValueError(f"cursor {cursor} and n {n} cannot be negative")
        counts = list(self._turns.counts(cursor))
        found = []
        for source in self._turns.after(cursor, n):
            epoch, place = divmod(counts[source], len(self.sources[source]))
            found.append(self.sources[source][self._order(source, epoch)[place]])
            counts[source] += 1
        return found

    def counts(self, cursor: int) -> tuple[int, ...]:
        """How many of the first `cursor` prompts each source gave."""
        return self._turns.counts(cursor)

    def epochs(self, cursor: int) -> tuple[float, ...]:
        """How many times each source has been walked through by then."""
        return tuple(c / len(s) if s else 0.0 for c, s in zip(self.counts(cursor), self.sources, strict=True))

    def _shuffled(self, source: int, epoch: int) -> tuple[int, ...]:
        """A permutation by a hash of each place: no generator has a state, and no library's version matters."""
        prefix = f"{self.seed} {source} {epoch} ".encode()

        def key(place: int) -> bytes:
            return hashlib.blake2b(prefix + str(place).encode(), digest_size=8).digest()

        return tuple(sorted(range(len(self.sources[source])), key=key))


class _Turns:
    """Whose turn it is: Tijdeman's solution of the chairman assignment problem, in whole numbers.

    R. Tijdeman, "The chairman assignment problem", Discrete Mathematics 32 (1980): of the sources that are owed at
    least 1/(2m-2) of a prompt, the one whose next prompt is due first. Every count then stays within 1 - 1/(2m-2) of
    its share, which neither rounding (counts would go down at times) nor taking the one that is owed most does for
    three or more. The sequence repeats after sum(shares) turns; turns are computed once and kept.
    """

    def __init__(self, shares: Sequence[int]) -> None:
        self.shares = shares
        self.period = sum(shares)
        self._live = [i for i, share in enumerate(shares) if share]
        self._turns: list[int] = []
        self._given = [0] * len(shares)
        self._marks = [tuple(self._given)]  # the counts after every `MARK` turns
        self._speed = {i: lcm(*(shares[j] for j in self._live)) // shares[i] for i in self._live}

    def after(self, cursor: int, n: int) -> list[int]:
        """Whose the n turns after the first `cursor` are."""
        self._extend(min(cursor % self.period + n, self.period))
        return [self._turns[k % self.period] for k in range(cursor, cursor + n)]

    def counts(self, cursor: int) -> tuple[int, ...]:
        """Turns that each had among the first `cursor`."""
        periods, rest = divmod(cursor, self.period)
        self._extend(rest)
        mark = rest // MARK
        counts = [periods * share + c for share, c in zip(self.shares, self._marks[mark], strict=True)]
        for source in self._turns[mark * MARK : rest]:
            counts[source] += 1
        return tuple(counts)

    def _extend(self, n: int) -> None:
        m, period = max(2 * len(self._live) - 2, 1), self.period
        while len(self._turns) < n:
            k = len(self._turns) + 1
            owed = {i: self.shares[i] * k - self._given[i] * period for i in self._live}  # times 1 / period
            ready = [i for i in self._live if owed[i] * m >= period] if len(self._live) > 1 else self._live
            turn = min(ready, key=lambda i: (((m - 1) * period - m * owed[i]) * self._speed[i], i))
            self._given[turn] += 1
            self._turns.append(turn)
            if k % MARK == 0:
                self._marks.append(tuple(self._given))


def _integers(weights: Sequence[float]) -> list[int]:
    """The weights as the smallest whole numbers of the same proportions, read as the decimals they are written as."""
    exact = [Fraction(str(weight)) for weight in weights]
    scale = lcm(*(w.denominator for w in exact))
    whole = [int(w * scale) for w in exact]
    return [w // gcd(*whole) for w in whole]
