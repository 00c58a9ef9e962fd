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
    classes = int(max(labels.max(initial=0), guesses.max(initial=0))) + 1
    codes, counts = np.unique(labels[wrong].astype(np.int64) * classes + guesses[wrong], return_counts=True)
    firsts, seconds = np.divmod(codes, classes)
    of = np.bincount(labels, minlength=classes)
    order = np.lexsort((codes, of[firsts], -counts))[:most]  # of small classes before large
    columns = (firsts[order], seconds[order], counts[order], of[firsts[order]])
    return [Pair(*row) for row in zip(*(column.tolist() for column in columns), strict=True)]
