"""The projection that time steps come from, on the tensor cores, as both kernels of the scan compute it, in Gluon.

One product for each warp and chunk: its channels times the rank, by the rank times the chunk's steps. In parts of 16
columns; the rank is a multiple of 8. The weights stay in shared memory: there are no registers to hold them in.
"""

# Device functions are written in Gluon's own dialect, which knows no annotations beyond constexpr, nor starred tuples.
# ruff: noqa: RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from vimfast_kernels.device import LOG2E, axis, softplus_in_ln2


@gluon.jit
def hold_weights(
    base, first, D: gl.constexpr, RANK: gl.constexpr, WARPS: gl.constexpr, WIDTH: gl.constexpr, WARP_ROWS: gl.constexpr,
    WARP_CHANNELS: gl.constexpr,
):  # fmt: skip
    """Shared memory with the weights [., RANK] at base for WIDTH channels a warp, zeros where there is no channel: row
    first + i + warp * WARP_ROWS for channel first + i + warp * WARP_CHANNELS. A barrier has to follow."""
    TILE: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 16, 2], [WARPS, 1, 1], [2, 1, 0])
    # No two of the eight rows that are read at once, 16 bytes each, lie in the same banks.
    ROWS: gl.constexpr = gl.SwizzledSharedLayout(8, 4, 2, order=[2, 1, 0])
    warp = axis(0, 0, WARPS, TILE)
    row = first + axis(1, 0, WIDTH, TILE)
    there = row + warp * WARP_CHANNELS < D
    row += warp * WARP_ROWS
    parts = ()
    for i in gl.static_range((RANK + 15) // 16):
        k = axis(2, 16 * i, 16, TILE)
        weights = gl.load(base + (row * RANK + k), mask=there & (k < RANK), other=0.0)
        parts = parts + (gl.allocate_shared_memory(base.dtype.element_ty, [WARPS, WIDTH, 16], ROWS, weights),)
    return parts


@gluon.jit
def load_factors(base, time, stride, RANK: gl.constexpr, WARPS: gl.constexpr, RIGHT: gl.constexpr):
    """What each warp's weights are multiplied with at these times [., 1, STEPS]; rows start on 16 bytes."""
    every = gl.zeros([WARPS, 1, 1], gl.int32, RIGHT)
    row = gl.multiple_of(time * stride, [8, 8, 8]) + every
    parts = ()
    for i in gl.static_range((RANK + 15) // 16):
        k = axis(1, 16 * i, 16, RIGHT)
        parts = parts + (gl.load(base + (row + k), mask=k < RANK, other=0.0),)
    return parts


@gluon.jit
def time_steps(
    weights, factors, bias, WARPS: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, ACC: gl.constexpr,
    PRECISE: gl.constexpr,
):  # fmt: skip
    """Time steps in units of ln 2 [WARPS, WIDTH, STEPS]; the bias [WARPS, WIDTH, 1] is in these units too."""
    acc = gl.zeros([WARPS, WIDTH, STEPS], gl.float32, ACC)
    for i in gl.static_range(len(weights)):
        acc = mma_v2(weights[i].load(gl.DotOperandLayout(0, ACC, 2)), factors[i], acc)
    return softplus_in_ln2(acc * LOG2E + bias, PRECISE)
