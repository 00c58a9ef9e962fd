"""What the kernels of an update take and give. Needs no triton."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor


class Moved(NamedTuple):
    """Parameters that AdamW moves: each has an entry in every sequence, and its tensors have as many elements."""

    gradients: Sequence[Tensor]
    weights: Sequence[Tensor]
    means: Sequence[Tensor]  # of gradients
    squares: Sequence[Tensor]  # means of squared gradients
    steps: Sequence[Tensor]  # fp32 scalars: updates so far
    averages: Sequence[Tensor]  # of weights; empty: none is kept
    places: Sequence[int]  # among all parameters
    groups: Sequence[int]  # whose options it has


class Judged(NamedTuple):
    """Gradients of parameters that something else moves."""

    gradients: Sequence[Tensor]
    places: Sequence[int]


class Options(NamedTuple):
    """AdamW's, of a group of parameters in one step."""

    lr: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float


class Counts(NamedTuple):
    """What is remembered of skipped steps, on the device."""

    skipped: Tensor  # fp32 [3]: in all, in a row up to now, longest row
    first_bad: Tensor  # bool [parameters]: non-finite in the first of them


class Verdict(NamedTuple):
    """On a step's gradients: fp32 scalars on the device that the next step overwrites."""

    bad: Tensor  # 1.0 where one is non-finite, else 0.0
    factor: Tensor  # by which they are clipped
