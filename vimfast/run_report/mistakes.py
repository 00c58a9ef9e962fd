"""What an evaluation got wrong: the images, and the pairs of classes."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Pair(NamedTuple):
    """Of the `of` images of class `label`, `images` were taken for class `guess`."""

    label: int
    guess: int
    images: int
    of: int


def hardest(own: np.ndarray, ids: np.ndarray, most: int) -> np.ndarray:
    """The places of up to `most` images whose own class got the least probability, the hardest first.

    Args:
        own: float [n], that probability.
        ids: int [n], which order equals, whoever evaluated them.
    """
    return np.lexsort((ids, own))[:most]


def confused(labels: np.ndarray, guesses: np.ndarray, most: int) -> list[Pair]:
    """Up to `most` pairs of classes, of which the first is taken for the second most often; int [n] each."""
    wrong = labels != guesses
    pairs, counts = np.unique(np.stack([labels[wrong], guesses[wrong]], axis=1), axis=0, return_counts=True)
    of = np.bincount(labels, minlength=1)
    order = np.lexsort((pairs[:, 1], pairs[:, 0], of[pairs[:, 0]], -counts))[:most]  # of small classes before large
    return [
        Pair(label, guess, count, int(of[label]))
        for (label, guess), count in zip(pairs[order].tolist(), counts[order].tolist(), strict=True)
    ]
