"""A mixer's weights to and from the form that its kernels read, in Triton: one launch for all of a layer's, in which
the layer's rows are normalized too. The norm's weight goes into in_proj's: rows without it serve both passes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vimfast_kernels.block.device import pack_and_normalize, write_all_gradients
from vimfast_kernels.block.weights import MixerWeights
from vimfast_kernels.norm.launch import Norm, Normalized, meta

ALIGN = 64  # entries: every piece of a buffer starts on a multiple
BLOCK = 1024  # entries a program copies
TILE = 4096  # entries a program adds up at a time
LONG_SUM = 256  # rows of such a tile where there are hundreds to add
NORM_SUM = 1024  # rows of such a tile where there may be a thousand: a second one waits for the first
SCAN_SUM = 128  # rows of such a tile where there is one for each image


class Packed(NamedTuple):
    """What the kernels and products of a layer read."""

    in_scaled: Tensor  # [2 d, C]: in_weight times the norm's weight [C]
    in_weight: Tensor  # [2 d, C]
    in_bias: Tensor | None  # [2 d]
    out_weight: Tensor  # [C, d]
    out_bias: Tensor | None  # [C]
    x_weight: Tensor  # [2, P + 2 N, d]: the rank filled up by zeros to P, see `padded`
    dt_weight: Tensor  # [2, d, P]
    conv_weight: Tensor  # [2, d, W], from here on fp32
    conv_bias: Tensor | None  # [2, d]
    taps: Tensor  # [2, W, d]: conv_weight again, channels side by side, as forward reads them
    dt_bias: Tensor  # [2, d]
    A: Tensor  # [2, d, N]
    D: Tensor  # [2, d]


class Pieces(NamedTuple):
    """The gradients of a layer's weights as its backward pass leaves them, fp32; None for those not requested."""

    in_weight: Tensor | None  # [parts, 2 d, C], still to be summed: of rows without the norm's weight and bias
    in_bias: Tensor | None  # [2 d]; for in_weight's, too, where the norm has a bias
    out_weight: Tensor | None  # [parts, C, d]
    out_bias: Tensor | None  # [C]
    x_weight: Tensor  # [2, parts, P + 2 N, d]
    dt_weight: Tensor  # [2, parts of its own, d, P]
    conv: Tensor  # [rows, 2, W + 1, d], taps and bias
    norm: Tensor  # [rows, 2, C], weight and bias
    scan: Tensor  # [2, rows, d (N + 2)], of A, D and the bias of the time steps
    A: Tensor  # [2, d, N], as it was


def padded(rank: int) -> int:
    """The rank up to a multiple of 8: rows of x_dbl then start on 16 bytes, and products are several times faster."""
    return rank + -rank % 8


def _sizes(weights: MixerWeights) -> dict[str, int]:
    d, n = weights.forth.A_log.shape
    rank = weights.forth.dt_weight.shape[1]
    return {
        "D": d, "N": n, "RANK": rank, "PAD": padded(rank),
        "WIDTH": weights.forth.conv_weight.shape[1],
    }  # fmt: skip


def _shapes(weights: MixerWeights, dtype: torch.dtype) -> tuple[dict[str, Sequence[int]], dict[str, Sequence[int]]]:
    """Of what is packed in `dtype`, and in fp32."""
    s = _sizes(weights)
    d, n = s["D"], s["N"]
    narrow: dict[str, Sequence[int]] = {"x_weight": (2, s["PAD"] + 2 * n, d), "dt_weight": (2, d, s["PAD"])}
    narrow["in_scaled"] = weights.in_weight.shape
    for name in ("in_weight", "in_bias", "out_weight", "out_bias"):
        x = getattr(weights, name)
        if x is not None and x.dtype != dtype:
            narrow[name] = x.shape
    width = s["WIDTH"]
    wide: dict[str, Sequence[int]] = {
        "A": (2, d, n), "D": (2, d), "dt_bias": (2, d), "conv_weight": (2, d, width), "taps": (2, width, d)
    }  # fmt: skip
    if weights.forth.conv_bias is not None:
        wide["conv_bias"] = (2, d)
    return narrow, wide


def _room(shape: Sequence[int]) -> int:
    return -(-math.prod(shape) // ALIGN) * ALIGN


def _carve(buffer: Tensor, shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    views, at = {}, 0
    for name, shape in shapes.items():
        views[name] = buffer[at : at + math.prod(shape)].view(shape)
        at += _room(shape)
    return views


def empty_packed(weights: MixerWeights, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The two buffers that hold a layer's packed weights, in `dtype` and in fp32."""
    narrow, wide = (sum(map(_room, shapes.values())) for shapes in _shapes(weights, dtype))
    like = weights.in_weight
    return like.new_empty(narrow, dtype=dtype), like.new_empty(wide, dtype=torch.float32)


def _views(weights: MixerWeights, narrow: Tensor, wide: Tensor) -> Packed:
    """Of the buffers; None for what is not packed, as the parameters of in_proj and out_proj in the right dtype."""
    shapes = _shapes(weights, narrow.dtype)
    views: dict[str, Any] = dict.fromkeys(Packed._fields)
    return Packed(**(views | _carve(narrow, shapes[0]) | _carve(wide, shapes[1])))


def unpack(weights: MixerWeights, narrow: Tensor, wide: Tensor) -> Packed:
    """The buffers' contents, and the parameters themselves where they were of the right dtype."""
    found = _views(weights, narrow, wide)
    outer = ("in_weight", "in_bias", "out_weight", "out_bias")
    return found._replace(**{name: getattr(weights, name) for name in outer if getattr(found, name) is None})


def pack_and_normalize_rows(
    weights: MixerWeights,
    norm: Norm,
    x: Tensor,  # [b, L, C]
    residual: Tensor | None,  # [b, L, C]
    total: Tensor,  # [b, L, C], fp32, written: keep * x + residual; may be the residual
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Normalized]:
    """The two buffers of `empty_packed`, filled, and total normalized, in `dtype`. All tensors are contiguous."""
    narrow, wide = empty_packed(weights, dtype)
    packed = _views(weights, narrow, wide)
    outer = [v for v in packed[:5] if v is not None]
    blocks = sum(triton.cdiv(v.numel(), BLOCK) for v in outer)
    blocks += sum(2 * triton.cdiv(v[0].numel(), BLOCK) for v in packed[5:] if v is not None)
    normed = Normalized(torch.empty_like(total, dtype=dtype), total.new_empty(total[..., 0].numel()))
    sizes = meta(x, norm)
    pack_and_normalize[(blocks + triton.cdiv(sizes["rows"], sizes["ROWS"]),)](
        weights, norm.weight, packed, x, residual, norm.noise, normed.rows, total, normed.rstd, **sizes,
        **_sizes(weights), BLOCK=BLOCK, BLOCKS=blocks,
    )  # fmt: skip
    return narrow, wide, normed


def write_gradients(
    pieces: Pieces,
    weights: MixerWeights,
    norm: Norm,
    grads: MixerWeights,
    dnorm_weight: Tensor | None,
    dnorm_bias: Tensor | None,
) -> None:
    """Every gradient that is not None, contiguous and of its parameter's shape, from the pieces."""
    summed = pieces.in_weight, pieces.out_weight, pieces.x_weight[0], pieces.dt_weight[0]
    parts = [1 if x is None else x.shape[0] for x in summed]
    in_rows, out_rows, rows, step_rows = (min(triton.next_power_of_2(p), TILE // 16) for p in parts)

    def blocks(x: Tensor | None, columns: int) -> int:
        return 0 if x is None else triton.cdiv(x.numel(), columns)

    grid = sum(blocks(x, TILE // NORM_SUM) for x in (dnorm_weight, dnorm_bias))
    for own in (grads.forth, grads.back):
        grid += sum(blocks(x, TILE // LONG_SUM) for x in (own.conv_weight, own.conv_bias))
        grid += blocks(None if own.x_weight is None else pieces.x_weight[0, 0], TILE // rows)
        grid += blocks(None if own.dt_weight is None else pieces.dt_weight[0, 0], TILE // step_rows)
        grid += sum(blocks(x, TILE // SCAN_SUM) for x in (own.A_log, own.D, own.dt_bias))
    grid += blocks(grads.in_weight, TILE // in_rows) + blocks(grads.out_weight, TILE // out_rows)
    grid += blocks(grads.in_bias, BLOCK) + blocks(grads.out_bias, BLOCK)
    if grid:
        write_all_gradients[(grid,)](
            pieces, norm.weight, norm.bias, grads, dnorm_weight, dnorm_bias, pieces.conv.shape[0], pieces.norm.shape[0],
            pieces.scan.shape[1], C=norm.weight.shape[0], **_sizes(weights),
            IN_PARTS=parts[0], OUT_PARTS=parts[1], PARTS=parts[2], STEP_PARTS=parts[3],
            IN_ROWS=in_rows, OUT_ROWS=out_rows, ROWS=rows, STEP_ROWS=step_rows,
            SCAN_ROWS=SCAN_SUM, NORM_ROWS=NORM_SUM, LONG=LONG_SUM, TILE=TILE, BLOCK=BLOCK,
        )  # fmt: skip
