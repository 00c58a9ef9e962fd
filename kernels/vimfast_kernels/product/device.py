"""fp32 products on the tensor cores, each value as two tf32 parts, in Triton."""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr, no starred tuples.
# ruff: noqa: RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _parts(x):
    """x as a tf32 number, rounded to nearest, and the rest, of which the tensor cores read 11 of at most 12 bits.

    The rest of an infinity is NaN, as that of a NaN is, so products of these are NaN.
    """
    high = ((x.to(tl.uint32, bitcast=True) + 0x1000) & 0xFFFFE000).to(tl.float32, bitcast=True)
    return high, x - high


@triton.jit
def split(
    w_ptr, high_ptr, low_ptr, w_row, w_column, w_batch,
    N: tl.constexpr, K: tl.constexpr, COLUMNS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    """The parts of w [., K, N], which may lie in memory in any way, as [., N, K]."""
    column = (tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS))[:, None]
    k = (tl.program_id(1) * INNER + tl.arange(0, INNER))[None, :]
    batch = tl.program_id(2)
    inside = (column < N) & (k < K)
    high, low = _parts(tl.load(w_ptr + batch * w_batch + k * w_row + column * w_column, mask=inside))
    at = batch * (N * K) + column * K + k
    tl.store(high_ptr + at, high, mask=inside)
    tl.store(low_ptr + at, low, mask=inside)


@triton.jit(do_not_specialize=["rows"])
def product(
    a_ptr, high_ptr, low_ptr, bias_ptr, c_ptr, rows, a_stride, a_batch, c_stride, c_batch,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, PANELS: tl.constexpr,
    INNER: tl.constexpr, ADD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """c = a (high + low)^T (+ bias) (+ c) of a [., rows, K], high and low [., N, K]: ROWS x (PANELS COLUMNS) a program.

    Without the product of two low parts, which is below fp32's own rounding. The tensor cores cut off what they add,
    which in a long sum would be a bias: INNER terms have an accumulator of their own, small ones first, which is then
    added with fp32's rounding.
    """
    TILES: tl.constexpr = (N + COLUMNS * PANELS - 1) // (COLUMNS * PANELS)
    first = (tl.program_id(0) % TILES) * (COLUMNS * PANELS)
    row = (tl.program_id(0) // TILES).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(1).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    k = tl.arange(0, INNER)
    inside = (row < rows)[:, None]
    a_at = a_ptr + batch * a_batch + row[:, None] * a_stride + k[None, :]
    w_at = batch * (N * K) + (first + column)[:, None] * K + k[None, :]
    totals = ()
    for _ in tl.static_range(PANELS):
        totals = totals + (tl.zeros((ROWS, COLUMNS), tl.float32),)
    for start in tl.range(0, K, INNER, num_stages=STAGES):
        if K % INNER == 0:
            a = tl.load(a_at + start, mask=inside, other=0.0)
        else:
            a = tl.load(a_at + start, mask=inside & (k < K - start)[None, :], other=0.0)
        a_high, a_low = _parts(a)
        sums = ()
        for i in tl.static_range(PANELS):
            at = w_at + (i * COLUMNS * K + start)
            if N % (COLUMNS * PANELS) == 0 and K % INNER == 0:
                high = tl.load(high_ptr + at)
                low = tl.load(low_ptr + at)
            else:
                within = (column < N - first - i * COLUMNS)[:, None] & (k < K - start)[None, :]
                high = tl.load(high_ptr + at, mask=within, other=0.0)
                low = tl.load(low_ptr + at, mask=within, other=0.0)
            part = tl.dot(a_low, high.T, input_precision="tf32")
            part = tl.dot(a_high, low.T, part, input_precision="tf32")
            part = tl.dot(a_high, high.T, part, input_precision="tf32")
            sums = sums + (totals[i] + part,)
        totals = sums
    for i in tl.static_range(PANELS):
        begin = first + i * COLUMNS
        total = totals[i]
        stored = inside
        if N % (COLUMNS * PANELS) != 0:
            stored = inside & (column < N - begin)[None, :]
        if bias_ptr is not None:
            total += tl.load(bias_ptr + begin + column, mask=column < N - begin, other=0.0)[None, :]
        c_at = c_ptr + batch * c_batch + row[:, None] * c_stride + (begin + column)[None, :]
        if ADD:
            total += tl.load(c_at, mask=stored, other=0.0)
        tl.store(c_at, total, mask=stored)
