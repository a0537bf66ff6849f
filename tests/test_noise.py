"""The sampling noise: a pure function of its counters, uniform, independent across them, and the same for ever."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray

from opd.engines import noise
from opd.engines.noise import key, uniform

IDS = np.arange(40, dtype=np.uint64) * np.uint64(0x1234567_89ABCDE1)
SAMPLES = np.arange(40, dtype=np.int64) % 8
GOLDEN = [
    [0.17884822999604955, 0.516961305616299, 0.02837008101292604],
    [0.012299868975404249, 0.5642027881358574, 0.36768953345067723],
]


def test_the_mixer_is_the_published_splitmix64() -> None:
    seed, words = np.array([1234567], np.uint64), np.arange(5, dtype=np.uint64)
    with np.errstate(over="ignore"):
        out = noise._absorb(seed, words)
    assert out.tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_golden_values_never_change() -> None:
    got = uniform(17, 3, IDS[1:4], SAMPLES[1:4], np.array([[0], [1535]]))
    assert got.tolist() == GOLDEN
    assert key("00000000000000ff") == 255


def test_a_value_depends_on_its_counters_only() -> None:
    whole = uniform(5, 9, IDS, SAMPLES, np.arange(30)[:, None])
    order = np.random.default_rng(0).permutation(40)
    assert np.array_equal(uniform(5, 9, IDS[order], SAMPLES[order], np.arange(30)[:, None]), whole[:, order])
    for row, position in [(0, 0), (7, 29), (39, 13)]:
        one = uniform(5, 9, IDS[row : row + 1], SAMPLES[row : row + 1], position)
        assert one.shape == (1,)
        assert one[0] == whole[position, row]


def test_every_counter_matters() -> None:
    base = uniform(5, 9, IDS, SAMPLES, 4)
    others = [
        uniform(6, 9, IDS, SAMPLES, 4),
        uniform(-5, 9, IDS, SAMPLES, 4),
        uniform(5, 10, IDS, SAMPLES, 4),
        uniform(9, 5, IDS, SAMPLES, 4),
        uniform(5, 9, IDS + np.uint64(1), SAMPLES, 4),
        uniform(5, 9, IDS, SAMPLES + 1, 4),
        uniform(5, 9, IDS, SAMPLES, 5),
    ]
    assert all(not np.isin(other, base).any() for other in others)


def _grid(counter: str) -> NDArray[np.float64]:
    """65,536 values, [4, 16384]: the named counter runs along the second axis."""
    run, few = np.arange(1 << 14), np.arange(4)[:, None]
    zeros = np.zeros(1, np.int64)
    if counter == "position":
        return uniform(1, 1, IDS[:4, None], zeros, run)
    if counter == "sample":
        return uniform(1, 1, IDS[:1], run, few)
    if counter == "prompt":
        return uniform(1, 1, run.astype(np.uint64), zeros, few)
    name = {"seed": 0, "step": 1}[counter]
    columns = [uniform(*((n, 1) if name == 0 else (1, n)), IDS[:1], zeros, few) for n in range(1 << 14)]
    return np.concatenate(columns, axis=1)


@pytest.mark.parametrize("counter", ["position", "sample", "prompt", "step", "seed"])
def test_uniform_and_independent_along_each_counter(counter: str) -> None:
    grid = _grid(counter)
    values = np.sort(grid.ravel())
    n = values.size
    assert values.min() > 0.0
    assert values.max() < 1.0
    distance = max((np.arange(1, n + 1) / n - values).max(), (values - np.arange(n) / n).max())
    assert distance * n**0.5 < 1.95  # Kolmogorov-Smirnov, one in a thousand

    for lag in (1, 2, 3, 8, 64):
        left, right = grid[:, :-lag].ravel() - 0.5, grid[:, lag:].ravel() - 0.5
        assert abs((left * right).mean() * 12) * left.size**0.5 < 4.0  # correlation in standard deviations

    pairs = np.floor(grid[:, :-1] * 16) * 16 + np.floor(grid[:, 1:] * 16)
    counts = np.bincount(pairs.ravel().astype(int), minlength=256)
    expected = counts.sum() / 256
    assert ((counts - expected) ** 2 / expected).sum() < 347.0  # chi-square, 255 degrees: one in ten thousand


@pytest.mark.parametrize("counter", ["position", "sample", "prompt"])
def test_every_bit_is_fair_and_flips_freely(counter: str) -> None:
    bits = (_grid(counter) * 2.0**52).astype(np.uint64)
    shifts = np.arange(52, dtype=np.uint64)
    ones = (bits[..., None] >> shifts) & np.uint64(1)
    flips = ((bits[:, 1:] ^ bits[:, :-1])[..., None] >> shifts) & np.uint64(1)
    for sample in (ones, flips):
        share = sample.reshape(-1, 52).mean(axis=0)
        chi_square = ((share - 0.5) ** 2 * 4 * (sample.size / 52)).sum()
        assert 15.0 < chi_square < 100.0  # 52 degrees of freedom, mean 52, standard deviation 10


def test_the_ends_are_excluded(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = iter([np.zeros(1, np.uint64)] * 4 + [np.array([0, 2**64 - 1], np.uint64)])
    monkeypatch.setattr(noise, "_absorb", lambda state, word: next(ends))
    low, high = uniform(0, 0, IDS[:1], SAMPLES[:1], 0)
    assert 0.0 < low < 1e-15
    assert 1.0 - 1e-15 < high < 1.0
