"""Numbers about texts and scores, with their uncertainty. Pure functions, no torch; all logarithms natural."""

from __future__ import annotations

import math
import re
import zlib
from collections import Counter
from collections.abc import Hashable, Sequence
from statistics import NormalDist, fmean
from typing import NamedTuple

import numpy as np

# Chinese, Japanese and Korean are written without spaces between words: a character is a word there.
_CJK = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af\uf900-\ufaff]"
_WORD = re.compile(rf"{_CJK}|(?:(?!{_CJK})\w)+|[^\w\s]")


class Interval(NamedTuple):
    """An estimate and the ends of its confidence interval."""

    value: float
    low: float
    high: float


def words(text: str) -> list[str]:
    """Words and punctuation marks, case-folded."""
    return _WORD.findall(text.casefold())


# -- how often, how much better


def accuracy(right: Sequence[bool] | Sequence[float], confidence: float = 0.95) -> Interval:
    """Share of ones with Wilson's score interval, which holds for few trials and for shares near 0 and 1.

    E. B. Wilson, "Probable inference, the law of succession, and statistical inference", JASA 22 (1927). Values
    between 0 and 1 (partly right answers) are allowed; the interval is then wider than need be.
    Raises `ValueError` when there are none, for no trials are no accuracy.
    """
    n = len(right)
    if not n:
        raise ValueError("accuracy of no answers")
    share = fmean(map(float, right))
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return Interval(share, min(share, max(0.0, middle - half)), max(share, min(1.0, middle + half)))


def pass_at_k(n: int, right: int, k: int) -> float:
    """Chance that of k answers drawn from n without replacement, of which `right` are right, at least one is.

    The unbiased estimate of M. Chen et al., "Evaluating large language models trained on code" (2021), eq. 1.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(f"pass@{k} of {n} answers with {right} right")
    return 1 - math.prod((n - right - i) / (n - i) for i in range(k))


def paired_difference(
    a: Sequence[float], b: Sequence[float], *, seed: int = 0, resamples: int = 2000, confidence: float = 0.95
) -> Interval:
    """Mean of b - a over the same prompts, with the percentile bootstrap interval over prompts.

    One value per prompt: several samples of a prompt are to be averaged first, for they are not independent.
    """
    if len(a) != len(b) or not len(a):
        raise ValueError(f"paired difference of {len(a)} and {len(b)} values")
    differences = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    rng = np.random.Generator(np.random.PCG64(seed))
    means = np.array(
        [differences[rng.integers(len(differences), size=len(differences))].mean() for _ in range(resamples)]
    )
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return Interval(float(differences.mean()), float(low), float(high))


# -- texts


def ngrams(items: Sequence[Hashable], n: int) -> Counter[tuple[Hashable, ...]]:
    """Every run of n items, with how often it occurs."""
    return Counter(tuple(items[i : i + n]) for i in range(len(items) - n + 1))


def overlap(text: str, reference: str, n: int = 1) -> float:
    """F1 of the n-grams of words that two texts share, counted with multiplicity (as ROUGE-n), between 0 and 1.

    Two texts without any n-gram are alike (1) if their words are the same, else unlike (0).
    """
    a, b = words(text), words(reference)
    grams_a, grams_b = ngrams(a, n), ngrams(b, n)
    total = grams_a.total() + grams_b.total()
    if not total:
        return float(a == b)
    return 2 * (grams_a & grams_b).total() / total


def length_ratio(lengths: Sequence[float], references: Sequence[float]) -> float:
    """Mean length over mean length of the references (not the mean of ratios, which short references would rule)."""
    if not len(lengths) or not sum(references):
        raise ValueError("length ratio without lengths, or to references without length")
    return fmean(lengths) / fmean(references)


def distinct(texts: Sequence[str], n: int = 1) -> float:
    """Distinct n-grams of words over all n-grams, over all texts together; nan where there are none.

    J. Li et al., "A diversity-promoting objective function for neural conversation models" (2016). It falls with the
    amount of text: compare equal amounts.
    """
    counts: Counter[tuple[Hashable, ...]] = Counter()
    for text in texts:
        counts += ngrams(words(text), n)
    return len(counts) / counts.total() if counts else math.nan


def repetition(text: str) -> float:
    """Bytes over zlib-compressed bytes: about 1 to 3 for prose, far above for text that repeats itself.

    Below a few hundred bytes the format's own eleven bytes weigh in, and the number can be below 1.
    """
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw) / len(zlib.compress(raw, 9)) if raw else 1.0


REFUSALS = (
    "i cannot", "i can't", "i can not", "i am unable", "i'm unable", "i am not able", "i'm not able", "i won't",
    "i will not", "i'm sorry", "i am sorry", "i apologize", "i apologise", "as an ai", "as a language model",
)  # fmt: skip
OPENING = 120  # characters in which a refusal is said


def refuses(text: str) -> bool:
    """Whether an answer opens with one of a few English phrases of refusal. "I'm sorry to hear that" is one too."""
    opening = text[:OPENING].casefold().replace("\N{RIGHT SINGLE QUOTATION MARK}", "'")
    return any(phrase in opening for phrase in REFUSALS)


class Histogram(NamedTuple):
    """`counts[i]` values lie in [edges[i], edges[i + 1]); the last bin has its upper edge too."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def histogram(
    values: Sequence[float], bins: int = 20, low: float | None = None, high: float | None = None
) -> Histogram:
    """Equal bins from `low` to `high`, by default the extremes; values outside are counted in the outer bins.

    Raises `ValueError` for no values, and for values that are not finite.
    """
    if not len(values) or not all(map(math.isfinite, values)):
        raise ValueError(
            f"histogram of {len(values)} values, of which {sum(not math.isfinite(v) for v in values)} not finite"
        )
    start = min(values) if low is None else low
    stop = max(values) if high is None else high
    if not start < stop:
        start, stop = start - 0.5, start + 0.5
    counts, edges = np.histogram(np.clip(np.asarray(values, dtype=float), start, stop), bins=bins, range=(start, stop))
    return Histogram(tuple(map(float, edges)), tuple(map(int, counts)))


# -- is it only length?


def length_only_accuracy(teacher: Sequence[float], student: Sequence[float]) -> float:
    """How well length alone tells the teacher's answer of a pair from the student's: what a critic must beat.

    The rule is "the answer whose length is nearer to t is the teacher's"; t = 0 is "the shorter", t = infinity "the
    longer", others are thresholds between. The best t of one half of the pairs (even places) is tried on the other
    half, and the other way round; the mean accuracy is returned, pairs of equal distance counting one half.

    Raises `ValueError` with fewer than two pairs: nothing would be held out.
    """
    if len(teacher) != len(student) or len(teacher) < 2:
        raise ValueError(f"length-only accuracy of {len(teacher)} teacher and {len(student)} student lengths")
    pairs_N2 = np.stack([np.asarray(teacher, dtype=float), np.asarray(student, dtype=float)], axis=1)
    halves = pairs_N2[::2], pairs_N2[1::2]
    right = [_won(test, _best(train)) * len(test) for train, test in (halves, halves[::-1])]
    return sum(right) / len(teacher)


def _won(pairs_N2: np.ndarray, t: float) -> float:
    teacher, student = pairs_N2.T
    nearer = np.sign(teacher - student) if math.isinf(t) else np.sign(np.abs(student - t) - np.abs(teacher - t))
    return float((1 + nearer).mean() / 2)


def _best(pairs_N2: np.ndarray) -> float:
    """The t that wins most; of equals the simplest: the longer, the shorter, then small ones first."""
    lengths = np.unique(pairs_N2)
    return max([math.inf, 0.0, *map(float, lengths)], key=lambda t: _won(pairs_N2, t))
