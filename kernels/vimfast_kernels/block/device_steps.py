"""The kernel that takes the gradients of the time steps, B and C back to the rows that they come from, in Triton."""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr, no starred tuples.
# ruff: noqa: RUF005
# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment,var-annotated"
from __future__ import annotations

import triton
import triton.language as tl

from vimfast_kernels.scan.device_backward import add_partials, load_partials


@triton.jit(do_not_specialize=["rows"])
def step_gradients(
    ddelta_ptr, low_ptr, weight_ptr, sums_ptr, scales_ptr, dx_dbl_ptr, pieces_ptr, rows,
    D: tl.constexpr, RANK: tl.constexpr, COLUMNS: tl.constexpr, STATES: tl.constexpr, PARTIALS: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx_dbl = (ddelta weight | sum of the PARTIALS of dB and dC, if any), and this program's share of ddelta^T low,
    with ddelta [., rows, D] read once.

    Rows of low are RANK + STATES apart, as those of dx_dbl. COLUMNS is RANK up to a power of two.
    """
    STRIDE: tl.constexpr = RANK + STATES
    part, direction = tl.program_id(0), tl.program_id(1)
    parts = tl.num_programs(0)
    all_rows = tl.num_programs(1) * rows.to(tl.int64)
    k = tl.arange(0, COLUMNS)[None, :]
    n = tl.arange(0, STATES)[None, :]
    totals = ()
    weights = ()
    for i in tl.static_range((D + CHANNELS - 1) // CHANNELS):
        channel = i * CHANNELS + tl.arange(0, CHANNELS)
        weight = weight_ptr + (direction * D + channel)[:, None] * RANK + k
        weights = weights + (tl.load(weight, mask=(channel < D)[:, None] & (k < RANK), other=0.0),)
        totals = totals + (tl.zeros((CHANNELS, COLUMNS), tl.float32),)
    own = direction * rows + tl.arange(0, ROWS)
    ahead = load_partials(sums_ptr, scales_ptr, own + part * ROWS, all_rows, STATES, PARTIALS)
    for start in tl.range(part * ROWS, rows, parts * ROWS):
        row = start + tl.arange(0, ROWS)[:, None]
        inside = row < rows
        at = (direction * rows + row).to(tl.int64)
        partials = ahead  # loaded a turn early: the compiler only does so for what products read
        ahead = load_partials(sums_ptr, scales_ptr, own + start + parts * ROWS, all_rows, STATES, PARTIALS)
        low = tl.load(low_ptr + at * STRIDE + k, mask=inside & (k < RANK), other=0.0)
        dlow = tl.zeros((ROWS, COLUMNS), tl.float32)
        sums = ()
        for i in tl.static_range((D + CHANNELS - 1) // CHANNELS):
            channel = i * CHANNELS + tl.arange(0, CHANNELS)
            ddelta = tl.load(ddelta_ptr + at * D + channel[None, :], mask=inside & (channel < D)[None, :], other=0.0)
            dlow = tl.dot(ddelta, weights[i], dlow)
            sums = sums + (tl.dot(tl.trans(ddelta), low, totals[i]),)
        totals = sums
        element = dx_dbl_ptr.dtype.element_ty
        tl.store(dx_dbl_ptr + at * STRIDE + k, dlow.to(element), mask=inside & (k < RANK))
        if PARTIALS > 0:
            dstates = add_partials(partials, PARTIALS)
            tl.store(dx_dbl_ptr + at * STRIDE + RANK + n, dstates.to(element), mask=inside)
    for i in tl.static_range((D + CHANNELS - 1) // CHANNELS):
        channel = i * CHANNELS + tl.arange(0, CHANNELS)
        piece = pieces_ptr + ((direction * parts + part) * D + channel)[:, None] * RANK + k
        tl.store(piece, totals[i], mask=(channel < D)[:, None] & (k < RANK))
