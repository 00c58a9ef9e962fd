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


@triton.jit
def normalize_rows(
    program, x_ptr, residual_ptr, noise_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, rstd_ptr, rows, length, rate, kept,
    eps, C: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Adds and normalizes the program-th block of rows; without weight and bias where these are None."""
    row = program * ROWS + tl.arange(0, ROWS)
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
    if rstd_ptr is not None:
        tl.store(rstd_ptr + row, rstd, mask=row < rows)
    v *= rstd[:, None]
    if weight_ptr is not None:
        v *= tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        v += tl.load(bias_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + at, v.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["rows", "length"])
def norm_forward(
    x_ptr, residual_ptr, noise_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, rows, length, rate, kept, eps,
    C: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    normalize_rows(
        tl.program_id(0), x_ptr, residual_ptr, noise_ptr, weight_ptr, bias_ptr, out_ptr, sum_ptr, None, rows, length,
        rate, kept, eps, C, CENTER, ROWS, COLUMNS,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows", "length"])
def norm_backward(
    dout_ptr, dsum_ptr, sum_ptr, normed_ptr, rstd_ptr, noise_ptr, weight_ptr, bias_ptr, dx_ptr, dresidual_ptr,
    partial_ptr, rows, length, rate, kept, eps,
    C: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # From the sum, or from what `normalize_rows` left without weight and bias. A program takes every num_programs-th
    # block of rows and keeps its share of the weight's gradient.
    column = tl.arange(0, COLUMNS)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((ROWS, COLUMNS), tl.float32)
    dbias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        mask = (row < rows)[:, None] & (column < C)[None, :]
        at = row.to(tl.int64)[:, None] * C + column[None, :]
        v = tl.load((sum_ptr if rstd_ptr is None else normed_ptr) + at, mask=mask, other=0.0).to(tl.float32)
        dout = tl.load(dout_ptr + at, mask=mask, other=0.0).to(tl.float32)
        dv = tl.zeros((ROWS, COLUMNS), tl.float32)
        if dsum_ptr is not None:  # here and not after the sums over rows, which would mean waiting for it once more
            dv = tl.load(dsum_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if rstd_ptr is None:
            v, rstd = _statistics(v, mask, C, eps, CENTER)
            v *= rstd[:, None]
        else:
            rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)
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
