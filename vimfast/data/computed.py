"""Permutations computed place by place, in no memory, for data sets whose drawn permutations take too much of it.

A Feistel network whose halves are the quotient and the remainder of a place by about the square root of the number of
images. It permutes a few more places than there are images; a result beyond them is permuted again until it is one
(cycle walking, after Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
"""

from __future__ import annotations

import functools
import math

import numpy as np

# From 6 on, fixed points and successors are as frequent as in drawn permutations; tests/test_order.py counts them.
_ROUNDS = 8


def permuted(places: np.ndarray, samples: int, *key: int) -> np.ndarray:
    """Where a permutation of 0, 1, ... `samples` - 1 takes these places.

    Args:
        places: int64 [n].
        key: names the permutation; numbers that are not negative.

    Returns:
        int64 [n].
    """
    high, low = _sides(samples)
    keys = _round_keys(key)
    result = np.empty(len(places), np.uint64)
    pending, current = np.arange(len(places)), places.astype(np.uint64)
    while len(pending):
        left, right = np.divmod(current, low)
        for number in range(0, _ROUNDS, 2):
            left = (left + _mixed(right + keys[number]) % high) % high
            right = (right + _mixed(left + keys[number + 1]) % low) % low
        current = left * low + right
        result[pending] = current
        beyond = current >= samples
        pending, current = pending[beyond], current[beyond]
    return result.astype(np.int64)


def permuted_in_windows(places: np.ndarray, bounds: tuple[int, ...], window: int, seed: int, epoch: int) -> np.ndarray:
    """Where an order takes these places that needs `window` shards at a time: shards shuffled, then all images of each
    `window` of them.

    Args:
        places: int64 [n].
        bounds: the first image of each shard, and the number of all images.

    Returns:
        int64 [n].
    """
    firsts, sizes, windows = _windows(bounds, window, seed, epoch)
    ends = np.cumsum(sizes)  # of the shuffled shards
    window_ends = ends[windows[1:] - 1]
    which = np.searchsorted(window_ends, places, "right")
    result = np.empty(len(places), np.int64)
    for number in np.unique(which).tolist():
        own = np.flatnonzero(which == number)
        begin, end = (0 if number == 0 else int(window_ends[number - 1])), int(window_ends[number])
        place = begin + permuted(places[own] - begin, end - begin, seed, epoch, number, 0)
        shard = np.searchsorted(ends, place, "right")
        result[own] = firsts[shard] + place - (ends[shard] - sizes[shard])
    return result


@functools.lru_cache(maxsize=4)
def _windows(bounds: tuple[int, ...], window: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The first image and the length of each shard, shuffled; and where among these each window begins and the last
    ends."""
    shards = len(bounds) - 1
    shuffled = np.random.default_rng((seed, epoch)).permutation(shards)
    lengths = [len(part) for part in np.array_split(shuffled, -(-shards // window))]
    edges = np.asarray(bounds, np.int64)
    return edges[shuffled], np.diff(edges)[shuffled], np.cumsum([0, *lengths])


@functools.lru_cache(maxsize=64)
def _round_keys(key: tuple[int, ...]) -> np.ndarray:
    return np.random.default_rng(key).integers(0, 2**64, _ROUNDS, dtype=np.uint64)


def _sides(samples: int) -> tuple[np.uint64, np.uint64]:
    """Of the smallest rectangle with at least so many places whose sides are about equal."""
    high = math.isqrt(max(samples, 1) - 1) + 1
    return np.uint64(high), np.uint64(-(-max(samples, 1) // high))


def _mixed(values: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, uint64 [n]: all bits depend on all bits."""
    values ^= values >> np.uint64(30)
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values
