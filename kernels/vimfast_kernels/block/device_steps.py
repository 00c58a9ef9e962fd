"""The kernel that takes the gradient of the time steps back through their projection, in Triton."""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr, no starred tuples.
# ruff: noqa: RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["rows"])
def step_gradients(
    ddelta_ptr, low_ptr, weight_ptr, dlow_ptr, pieces_ptr, rows,
    D: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, STRIDE: tl.constexpr, ROWS: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """dlow = ddelta weight, and this program's share of ddelta^T low, with ddelta [., rows, D] read once.

    low and dlow have rows STRIDE apart. COLUMNS is RANK up to a power of two.
    """
    part, direction = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    k = tl.arange(0, COLUMNS)[None, :]
    totals = ()
    weights = ()
    for i in tl.static_range((D + CHANNELS - 1) // CHANNELS):
        channel = i * CHANNELS + tl.arange(0, CHANNELS)
        weight = weight_ptr + (direction * D + channel)[:, None] * RANK + k
        weights = weights + (tl.load(weight, mask=(channel < D)[:, None] & (k < RANK), other=0.0),)
        totals = totals + (tl.zeros((CHANNELS, COLUMNS), tl.float32),)
    for start in tl.range(part * ROWS, rows, parts * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = row < rows
        at = (direction * rows + row).to(tl.int64)
        low = tl.load(low_ptr + at * STRIDE + k, mask=inside & (k < RANK), other=0.0)
        dlow = tl.zeros((ROWS, COLUMNS), tl.float32)
        sums = ()
        for i in tl.static_range((D + CHANNELS - 1) // CHANNELS):
            channel = i * CHANNELS + tl.arange(0, CHANNELS)
            ddelta = tl.load(ddelta_ptr + at * D + channel[None, :], mask=inside & (channel < D)[None, :], other=0.0)
            dlow = tl.dot(ddelta, weights[i], dlow)
            sums = sums + (tl.dot(tl.trans(ddelta), low, totals[i]),)
        totals = sums
        tl.store(dlow_ptr + at * STRIDE + k, dlow.to(dlow_ptr.dtype.element_ty), mask=inside & (k < RANK))
    for i in tl.static_range((D + CHANNELS - 1) // CHANNELS):
        channel = i * CHANNELS + tl.arange(0, CHANNELS)
        piece = pieces_ptr + ((direction * parts + part) * D + channel)[:, None] * RANK + k
        tl.store(piece, totals[i], mask=(channel < D)[:, None] & (k < RANK))
