"""Deterministic sums over many rows, in Triton."""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["count"])
def _sum_rows(in_ptr, out_ptr, count, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """out [WIDTH] = sum over the rows of in [count, WIDTH]."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < count)[:, None] & (column < WIDTH)[None, :]
        total += tl.load(in_ptr + row[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, 0), mask=column < WIDTH)


def sum_rows(partial: Tensor) -> Tensor:
    """Sum over the first dimension in fp32, in a fixed order."""
    count, width = partial.shape[0], partial[0].numel()
    out = partial.new_empty(partial.shape[1:])
    columns = 16
    _sum_rows[(triton.cdiv(width, columns),)](partial, out, count, WIDTH=width, ROWS=256, COLUMNS=columns, num_warps=8)
    return out
