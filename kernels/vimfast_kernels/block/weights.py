"""The parameters of a bidirectional mixer as its ops take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Direction(NamedTuple):
    """What each direction has of its own: d channels, W taps, N states, rank R."""

    conv_weight: Tensor  # [d, W]
    conv_bias: Tensor | None  # [d]
    x_weight: Tensor  # [R + 2 N, d]
    dt_weight: Tensor  # [d, R]
    dt_bias: Tensor  # [d]
    A_log: Tensor  # [d, N], A = -exp(A_log)
    D: Tensor  # [d]


class MixerWeights(NamedTuple):
    """All of a mixer of width C, of any float dtype; biases are optional, conv_bias in both directions or in none."""

    in_weight: Tensor  # [2 d, C]
    in_bias: Tensor | None  # [2 d]
    forth: Direction  # from the first position to the last
    back: Direction  # from the last position to the first
    out_weight: Tensor  # [C, d]
    out_bias: Tensor | None  # [C]


def flatten(weights: MixerWeights) -> list[Tensor | None]:
    return [*weights[:2], *weights.forth, *weights.back, *weights[4:]]


def unflatten(flat: Sequence[Any]) -> MixerWeights:
    """The inverse of :func:`flatten`; also of gradients, None where there is none."""
    in_weight, in_bias, *directions, out_weight, out_bias = flat
    forth, back = Direction(*directions[:7]), Direction(*directions[7:])
    return MixerWeights(in_weight, in_bias, forth, back, out_weight, out_bias)
