"""The kernels that pack a mixer's weights, normalizing rows beside it, and write the weights' gradients, in Triton."""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

from vimfast_kernels.norm.device import normalize_rows


@triton.jit
def _inside(block, SIZE: tl.constexpr, COLUMNS: tl.constexpr):
    return (block >= 0) & (block * COLUMNS < SIZE)


@triton.jit
def _copy(block, src, dst, offset, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    """The block-th BLOCK entries of dst[offset:] = src [SIZE]; returns the number of the block after the array."""
    if dst is not None:
        if _inside(block, SIZE, BLOCK):
            at = block * BLOCK + tl.arange(0, BLOCK)
            mask = at < SIZE
            tl.store(dst + offset + at, tl.load(src + at, mask=mask).to(dst.dtype.element_ty), mask=mask)
        block -= tl.cdiv(SIZE, BLOCK)
    return block


@triton.jit
def _pack(
    block, raw, norm_weight, packed, C: tl.constexpr, D: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr,
    PAD: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The block-th block of all arrays, one after the other: counts them off until it comes to its own."""
    if _inside(block, 2 * D * C, BLOCK):
        at = block * BLOCK + tl.arange(0, BLOCK)
        mask = at < 2 * D * C
        v = tl.load(raw.in_weight + at, mask=mask).to(tl.float32)
        v *= tl.load(norm_weight + at % C, mask=mask).to(tl.float32)
        tl.store(packed.in_scaled + at, v.to(packed.in_scaled.dtype.element_ty), mask=mask)
    block -= tl.cdiv(2 * D * C, BLOCK)
    block = _copy(block, raw.in_weight, packed.in_weight, 0, 2 * D * C, BLOCK)
    block = _copy(block, raw.out_weight, packed.out_weight, 0, C * D, BLOCK)
    block = _copy(block, raw.in_bias, packed.in_bias, 0, 2 * D, BLOCK)
    block = _copy(block, raw.out_bias, packed.out_bias, 0, C, BLOCK)
    for k in tl.static_range(2):
        own = raw.back if k else raw.forth
        block = _copy(block, own.conv_weight, packed.conv_weight, k * D * WIDTH, D * WIDTH, BLOCK)
        block = _copy(block, own.conv_bias, packed.conv_bias, k * D, D, BLOCK)

        if _inside(block, WIDTH * D, BLOCK):
            at = block * BLOCK + tl.arange(0, BLOCK)
            mask = at < WIDTH * D
            taps = tl.load(own.conv_weight + at % D * WIDTH + at // D, mask=mask, other=0.0)
            tl.store(packed.taps + k * WIDTH * D + at, taps.to(tl.float32), mask=mask)
        block -= tl.cdiv(WIDTH * D, BLOCK)

        block = _copy(block, own.dt_bias, packed.dt_bias, k * D, D, BLOCK)
        block = _copy(block, own.D, packed.D, k * D, D, BLOCK)

        if _inside(block, D * N, BLOCK):
            at = block * BLOCK + tl.arange(0, BLOCK)
            mask = at < D * N
            rates = tl.load(own.A_log + at, mask=mask, other=0.0).to(tl.float32)
            tl.store(packed.A + k * D * N + at, -tl.exp(rates), mask=mask)
        block -= tl.cdiv(D * N, BLOCK)

        if _inside(block, (PAD + 2 * N) * D, BLOCK):
            at = block * BLOCK + tl.arange(0, BLOCK)
            mask = at < (PAD + 2 * N) * D
            source = tl.where(at < PAD * D, at, at - (PAD - RANK) * D)
            there = mask & ((at < RANK * D) | (at >= PAD * D))
            v = tl.load(own.x_weight + source, mask=there, other=0.0)
            tl.store(packed.x_weight + k * (PAD + 2 * N) * D + at, v.to(packed.x_weight.dtype.element_ty), mask=mask)
        block -= tl.cdiv((PAD + 2 * N) * D, BLOCK)

        if _inside(block, D * PAD, BLOCK):
            at = block * BLOCK + tl.arange(0, BLOCK)
            mask = at < D * PAD
            there = mask & (at % PAD < RANK)
            v = tl.load(own.dt_weight + at // PAD * RANK + at % PAD, mask=there, other=0.0)
            tl.store(packed.dt_weight + k * D * PAD + at, v.to(packed.dt_weight.dtype.element_ty), mask=mask)
        block -= tl.cdiv(D * PAD, BLOCK)


@triton.jit(do_not_specialize=["rows", "length"])
def pack_and_normalize(
    raw, norm_weight, packed, x_ptr, residual_ptr, noise_ptr, normed_ptr, sum_ptr, rstd_ptr, rows, length, rate, kept,
    eps, C: tl.constexpr, D: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, PAD: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, CENTER: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # The first BLOCKS programs pack. Alone they would take 2.6 us, nearly all of which is waiting.
    program = tl.program_id(0)
    if program < BLOCKS:
        _pack(program, raw, norm_weight, packed, C, D, N, RANK, PAD, WIDTH, BLOCK)
    else:
        normalize_rows(
            program - BLOCKS, x_ptr, residual_ptr, noise_ptr, None, None, normed_ptr, sum_ptr, rstd_ptr, rows, length,
            rate, kept, eps, C, CENTER, ROWS, COLUMNS,
        )  # fmt: skip


@triton.jit
def _sum_of_rows(src, source, mask, count, stride, ROWS: tl.constexpr):
    """The sum over i < count of src[i * stride + source], in a fixed order."""
    total = tl.zeros((ROWS, source.shape[0]), tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        at = row[:, None] * stride + source[None, :]
        total += tl.load(src + at, mask=(row < count)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _sum_rows(src, source, dst, target, mask, count, stride, ROWS: tl.constexpr, factor=None):
    """dst[target] = `_sum_of_rows` times factor[target]."""
    total = _sum_of_rows(src, source, mask, count, stride, ROWS)
    if factor is not None:
        total *= tl.load(factor + target, mask=mask, other=0.0)
    tl.store(dst + target, total.to(dst.dtype.element_ty), mask=mask)


@triton.jit
def _add(
    block, src, offset, dst, count, stride, SIZE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, factor=None
):  # fmt: skip
    """`_copy` of the sum over the first dimension of src[:, offset : offset + SIZE], src [count, stride], times
    factor [SIZE]."""
    if dst is not None:
        COLUMNS: tl.constexpr = TILE // ROWS
        if _inside(block, SIZE, COLUMNS):
            column = block * COLUMNS + tl.arange(0, COLUMNS)
            _sum_rows(src, offset + column, dst, column, column < SIZE, count, stride, ROWS, factor)
        block -= tl.cdiv(SIZE, COLUMNS)
    return block


@triton.jit
def _add_taps(block, src, k, dst, count, D: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr):
    """`_add` of direction k's taps, which src holds as [count, 2, WIDTH + 1, D], into dst [D, WIDTH]."""
    if dst is not None:
        COLUMNS: tl.constexpr = TILE // ROWS
        if _inside(block, WIDTH * D, COLUMNS):
            at = block * COLUMNS + tl.arange(0, COLUMNS)
            source = k * (WIDTH + 1) * D + at
            _sum_rows(src, source, dst, at % D * WIDTH + at // D, at < WIDTH * D, count, 2 * (WIDTH + 1) * D, ROWS)
        block -= tl.cdiv(WIDTH * D, COLUMNS)
    return block


@triton.jit
def _add_states(
    block, src, k, dst, COUNT: tl.constexpr, D: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, PAD: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`_add` of direction k of src [2, COUNT, PAD + 2 N, D] into dst [RANK + 2 N, D]: without the padding."""
    if dst is not None:
        COLUMNS: tl.constexpr = TILE // ROWS
        SIZE: tl.constexpr = (PAD + 2 * N) * D
        if _inside(block, SIZE, COLUMNS):
            at = block * COLUMNS + tl.arange(0, COLUMNS)
            target = tl.where(at < PAD * D, at, at - (PAD - RANK) * D)
            mask = (at < RANK * D) | ((at >= PAD * D) & (at < SIZE))
            _sum_rows(src, k * COUNT * SIZE + at, dst, target, mask, COUNT, SIZE, ROWS)
        block -= tl.cdiv(SIZE, COLUMNS)
    return block


@triton.jit
def _add_steps(
    block, src, k, dst, COUNT: tl.constexpr, D: tl.constexpr, RANK: tl.constexpr, PAD: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`_add` of direction k of src [2, COUNT, D, PAD] into dst [D, RANK]: without the padding."""
    if dst is not None:
        COLUMNS: tl.constexpr = TILE // ROWS
        SIZE: tl.constexpr = D * PAD
        if _inside(block, SIZE, COLUMNS):
            at = block * COLUMNS + tl.arange(0, COLUMNS)
            mask = (at < SIZE) & (at % PAD < RANK)
            _sum_rows(src, k * COUNT * SIZE + at, dst, at // PAD * RANK + at % PAD, mask, COUNT, SIZE, ROWS)
        block -= tl.cdiv(SIZE, COLUMNS)
    return block


@triton.jit
def _add_in_weight(
    block, pieces, norm_weight, norm_bias, dst, COUNT: tl.constexpr, C: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """in_proj's gradient [2 D, C]: pieces.in_weight summed, which it would be had the rows neither the norm's weight
    nor its bias, times the one, and the gradient of in_proj's output, summed over the rows, times the other."""
    if dst is not None:
        COLUMNS: tl.constexpr = TILE // ROWS
        SIZE: tl.constexpr = 2 * D * C
        if _inside(block, SIZE, COLUMNS):
            at = block * COLUMNS + tl.arange(0, COLUMNS)
            mask = at < SIZE
            total = _sum_of_rows(pieces.in_weight, at, mask, COUNT, SIZE, ROWS)
            total *= tl.load(norm_weight + at % C, mask=mask, other=0.0).to(tl.float32)
            if norm_bias is not None:
                bias = tl.load(norm_bias + at % C, mask=mask, other=0.0).to(tl.float32)
                total += tl.load(pieces.in_bias + at // C, mask=mask, other=0.0) * bias
            tl.store(dst + at, total.to(dst.dtype.element_ty), mask=mask)
        block -= tl.cdiv(SIZE, COLUMNS)
    return block


@triton.jit(do_not_specialize=["conv_rows", "norm_rows", "scan_rows"])
def write_all_gradients(
    pieces, norm_weight, norm_bias, grads, dnorm_weight, dnorm_bias, conv_rows, norm_rows, scan_rows,
    C: tl.constexpr, D: tl.constexpr, N: tl.constexpr, RANK: tl.constexpr, PAD: tl.constexpr, WIDTH: tl.constexpr,
    IN_PARTS: tl.constexpr, OUT_PARTS: tl.constexpr, PARTS: tl.constexpr, STEP_PARTS: tl.constexpr,
    IN_ROWS: tl.constexpr, OUT_ROWS: tl.constexpr, ROWS: tl.constexpr, STEP_ROWS: tl.constexpr, SCAN_ROWS: tl.constexpr,
    NORM_ROWS: tl.constexpr, LONG: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    block = _add(block, pieces.norm, 0, dnorm_weight, norm_rows, 2 * C, C, NORM_ROWS, TILE)
    block = _add(block, pieces.norm, C, dnorm_bias, norm_rows, 2 * C, C, NORM_ROWS, TILE)
    for k in tl.static_range(2):
        own = grads.back if k else grads.forth
        block = _add_taps(block, pieces.conv, k, own.conv_weight, conv_rows, D, WIDTH, LONG, TILE)
        bias_at = (k * (WIDTH + 1) + WIDTH) * D
        block = _add(block, pieces.conv, bias_at, own.conv_bias, conv_rows, 2 * (WIDTH + 1) * D, D, LONG, TILE)
        block = _add_states(block, pieces.x_weight, k, own.x_weight, PARTS, D, N, RANK, PAD, ROWS, TILE)
        block = _add_steps(block, pieces.dt_weight, k, own.dt_weight, STEP_PARTS, D, RANK, PAD, STEP_ROWS, TILE)
        scan = pieces.scan + (k * scan_rows).to(tl.int64) * (D * (N + 2))
        rates = pieces.A + k * D * N  # dA / dA_log = A
        block = _add(block, scan, 0, own.A_log, scan_rows, D * (N + 2), D * N, SCAN_ROWS, TILE, rates)
        block = _add(block, scan, D * N, own.D, scan_rows, D * (N + 2), D, SCAN_ROWS, TILE)
        block = _add(block, scan, D * (N + 1), own.dt_bias, scan_rows, D * (N + 2), D, SCAN_ROWS, TILE)
    block = _add_in_weight(block, pieces, norm_weight, norm_bias, grads.in_weight, IN_PARTS, C, D, IN_ROWS, TILE)
    block = _add(block, pieces.out_weight, 0, grads.out_weight, OUT_PARTS, C * D, C * D, OUT_ROWS, TILE)
    block = _copy(block, pieces.in_bias, grads.in_bias, 0, 2 * D, BLOCK)
    _copy(block, pieces.out_bias, grads.out_bias, 0, C, BLOCK)
