"""Sampling noise as a pure function of what is being sampled, so that no rank, slot or batch can change it.

Five counters (seed, step, prompt id, sample number, position) are absorbed one after the other by the SplitMix64
generator (Steele, Lea and Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014): each word selects
one output of the stream that the words before it seeded. No state, no order of calls.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

_GAMMA: Final = np.uint64(0x9E3779B97F4A7C15)
_MASK: Final = (1 << 64) - 1

Words = NDArray[np.uint64]


def _mix(word: Words) -> Words:
    """SplitMix64's output function: a bijection of 64 bits in which every input bit moves half of the output bits."""
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return word ^ (word >> np.uint64(31))


def _absorb(state: Words, word: Words) -> Words:
    """Output number `word` of the stream seeded with `state`."""
    return _mix(state + (word + np.uint64(1)) * _GAMMA)


def _words(value: int | NDArray[np.int64] | Words) -> Words:
    return np.asarray([value & _MASK] if isinstance(value, int) else value).astype(np.uint64)


def uniform(
    seed: int,
    step: int,
    prompt_ids: Words,
    samples: NDArray[np.int64],
    position: int | NDArray[np.int64],
) -> NDArray[np.float64]:
    """Uniform numbers in the open interval (0, 1), 52 random bits each, one for each broadcast element.

    `prompt_ids` are `Prompt.id` read as 64-bit integers, `samples` the sample numbers of one prompt, `position` counts
    the spoken tokens from 0. The three broadcast against each other: ids and samples [rows] with position
    [positions, 1] give [positions, rows].
    """
    with np.errstate(over="ignore"):  # arithmetic is modulo 2**64 on purpose
        state = _absorb(_absorb(np.zeros(1, np.uint64), _words(seed)), _words(step))
        state = _absorb(_absorb(state, _words(prompt_ids)), _words(samples))
        bits = _absorb(state, _words(position))
    # 52 bits and a half: both ends are excluded and every value is exact in float64.
    return ((bits >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def key(prompt_id: str) -> int:
    """`Prompt.id` (16 hexadecimal digits) as the integer that `uniform` takes."""
    return int(prompt_id, 16)
