"""The kernels of the residual addition and the norms, in Triton."""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _statistics(v, mask, C: tl.constexpr, eps, CENTER: tl.constexpr):
    """(v - mean, 1 / deviation) of each row; without CENTER the mean is taken as 0."""
    if CENTER:
        v = tl.where(mask, v - tl.sum(v, 1)[:, None] / C, 0.0)
    return v, 1.0 / tl.sqrt(tl.sum(v * v, 1) / C + eps)


@triton.jit
def _share(noise_ptr, sample, mask, rate, kept):
    """What stays of each row of a sample: nothing where its noise is below the rate."""
    noise = tl.load(noise_ptr + sample, mask=mask, other=0.0)
    return tl.where(noise < rate, 0.0, kept)[:, None]


@triton.jit(do_not_specialize=["rows", "length"])
def norm_forward(
    x_ptr, residual_ptr, noise_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, rows, length, rate, kept, eps,
    C: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row < rows)[:, None] & (column < C)[None, :]
    at = row.to(tl.int64)[:, None] * C + column[None, :]
    v = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)
    if noise_ptr is not None:
        v *= _share(noise_ptr, row // length, row < rows, rate, kept)
    if residual_ptr is not None:
        v += tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(sum_ptr + at, v, mask=mask)
    v, rstd = _statistics(v, mask, C, eps, CENTER)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    v = v * rstd[:, None] * weight[None, :]
    if bias_ptr is not None:
        v += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at, v.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "length"])
def norm_backward(
    dout_ptr, dsum_ptr, sum_ptr, noise_ptr, weight_ptr, bias_ptr, dx_ptr, dresidual_ptr, again_ptr, partial_ptr,
    rows, length, rate, kept, eps,
    C: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program takes every num_programs-th block of rows and keeps its share of the weight's gradient.
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + column[None, :]
        v = tl.load(sum_ptr + at, mask=mask, other=0.0)
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dv = tl.zeros((ROWS, COLUMNS), tl.float32)
        if dsum_ptr is not None:  # here and not after the sums over rows, which would mean waiting for it once more
            dv = tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        v, rstd = _statistics(v, mask, C, eps, CENTER)
        v *= rstd[:, None]
        if again_ptr is not None:
            out = v * weight
            if bias_ptr is not None:
                out += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
            tl.store(again_ptr + at, out.to(again_ptr.dtype.element_ty), mask=mask)
        dweight += dout * v
        if bias_ptr is not None:
            dbias += dout
        g = dout * weight
        own = g - v * (tl.sum(g * v, 1) / C)[:, None]
        if CENTER:
            own -= (tl.sum(g, 1) / C)[:, None]
        dv += own * rstd[:, None]
        if dresidual_ptr is not None:
            tl.store(dresidual_ptr + at, dv.to(dresidual_ptr.dtype.element_ty), mask=mask)
        if noise_ptr is not None:
            dv *= _share(noise_ptr, row // length, row < rows, rate, kept)
        tl.store(dx_ptr + at, dv.to(dx_ptr.dtype.element_ty), mask=mask)
    at = partial_ptr + tl.program_id(0) * (2 * C) + column
    tl.store(at, tl.sum(dweight, 0), mask=column < C)
    tl.store(at + C, tl.sum(dbias, 0), mask=column < C)
