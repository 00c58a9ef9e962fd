"""Gradient norm, AdamW and weight average over all parameters at once, in Triton.

Tensors are found by tables in the device's memory. A row of `tensors` is int64: the columns below. A row of `chunks` is
int32: a tensor's row, and which BLOCK of its elements.
"""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr.
# ruff: noqa: RET505
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import triton
import triton.language as tl

# Columns of a tensor's row. The last six are used only where AdamW moves the tensor.
GRADIENT = tl.constexpr(0)  # an address, as are WEIGHT, MEAN, SQUARE, STEP and AVERAGE
ELEMENTS = tl.constexpr(1)
PLACE = tl.constexpr(2)  # of the parameter, among all of which non-finite gradients are noted
WEIGHT = tl.constexpr(3)
MEAN = tl.constexpr(4)  # of gradients
SQUARE = tl.constexpr(5)  # mean of squared gradients
STEP = tl.constexpr(6)  # an fp32 scalar: updates so far
AVERAGE = tl.constexpr(7)  # of weights; not used where none is kept
GROUP = tl.constexpr(8)  # row of `options`
COLUMNS = tl.constexpr(9)

# Columns of a group's options, fp32.
LR = tl.constexpr(0)
DECAY = tl.constexpr(1)  # of weights
BETA1 = tl.constexpr(2)
LOG1 = tl.constexpr(3)  # natural logarithm of BETA1
BETA2 = tl.constexpr(4)
LOG2 = tl.constexpr(5)
EPS = tl.constexpr(6)
OPTIONS = tl.constexpr(7)

# Entries of the verdict, fp32.
BAD = tl.constexpr(0)  # 1 where a gradient is non-finite, else 0
FACTOR = tl.constexpr(1)  # of gradients, from clipping


@triton.jit
def _pointer(entry_ptr, DTYPE: tl.constexpr, BYTES: tl.constexpr):
    """The memory whose address is in a table; it is a multiple of BYTES."""
    return tl.multiple_of(tl.load(entry_ptr).to(tl.pointer_type(DTYPE)), BYTES)


@triton.jit
def _read(ptr, inside, WHOLE: tl.constexpr):
    """As fp32. A load without a mask takes 16 bytes at once."""
    if WHOLE:
        return tl.load(ptr).to(tl.float32)
    else:
        return tl.load(ptr, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _sum_of_squares(row_ptr, at, inside, DTYPE: tl.constexpr, BYTES: tl.constexpr, WHOLE: tl.constexpr):
    gradient = _read(_pointer(row_ptr + GRADIENT, DTYPE, BYTES) + at, inside, WHOLE)
    return tl.sum(gradient * gradient)


@triton.jit(do_not_specialize=["first"])
def sum_squares(
    tensors_ptr, chunks_ptr, sums_ptr, first, DTYPE: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """sums [chunk] = sum of a chunk's squared gradients; the chunks from `first` on."""
    chunk = first + tl.program_id(0)
    row_ptr = tensors_ptr + tl.load(chunks_ptr + 2 * chunk) * COLUMNS
    start = tl.load(chunks_ptr + 2 * chunk + 1) * BLOCK
    at, elements = start + tl.arange(0, BLOCK), tl.load(row_ptr + ELEMENTS).to(tl.int32)
    if start + BLOCK <= elements:
        tl.store(sums_ptr + chunk, _sum_of_squares(row_ptr, at, at < elements, DTYPE, BYTES, True))
    else:
        tl.store(sums_ptr + chunk, _sum_of_squares(row_ptr, at, at < elements, DTYPE, BYTES, False))


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0, to 3e-7 of it: as a series where the difference would cancel."""
    series = 1.0 + x * (1.0 / 9.0)
    series = 1.0 + x * (1.0 / 8.0) * series
    series = 1.0 + x * (1.0 / 7.0) * series
    series = 1.0 + x * (1.0 / 6.0) * series
    series = 1.0 + x * (1.0 / 5.0) * series
    series = 1.0 + x * (1.0 / 4.0) * series
    series = 1.0 + x * (1.0 / 3.0) * series
    series = 1.0 + x * (1.0 / 2.0) * series
    return tl.where(x > -0.5, -x * series, 1.0 - tl.exp(x))


@triton.jit(do_not_specialize=["chunks", "moved", "largest"])
def judge(
    tensors_ptr, chunks_ptr, options_ptr, sums_ptr, counts_ptr, first_bad_ptr, verdict_ptr, corrections_ptr,
    chunks, moved, largest, WIDTH: tl.constexpr,
):  # fmt: skip
    """From the chunks' sums, in a fixed order: whether the step counts, and what clipping makes of its gradients.

    counts: fp32, steps skipped in all, in a row up to now, longest row. first_bad: 1 for the places whose gradients
    were non-finite in the first of them. The first `moved` tensors are AdamW's: their steps are counted unless this one
    is skipped, and corrections [moved, 2] are 1 - beta1^step and the root of 1 - beta2^step. One program.
    """
    # Read before the sum, whose barrier all threads pass before one of them writes these.
    skipped, row, longest = tl.load(counts_ptr), tl.load(counts_ptr + 1), tl.load(counts_ptr + 2)
    lane = tl.arange(0, WIDTH)
    total = tl.zeros((WIDTH,), tl.float32)
    for start in range(0, chunks, WIDTH):
        total += tl.load(sums_ptr + start + lane, mask=start + lane < chunks, other=0.0)
    norm = tl.sqrt_rn(tl.sum(total))
    bad = tl.where(norm < float("inf"), 0.0, 1.0)  # no NaN is
    if (skipped == 0.0) & (bad == 1.0):
        for start in range(0, chunks, WIDTH):
            inside = start + lane < chunks
            finite = tl.load(sums_ptr + start + lane, mask=inside, other=0.0) < float("inf")
            tensor = tl.load(chunks_ptr + 2 * (start + lane), mask=inside, other=0)
            place = tl.load(tensors_ptr + tensor * COLUMNS + PLACE, mask=inside, other=0)
            tl.store(first_bad_ptr + place, tl.full((WIDTH,), 1, tl.int8), mask=inside & (finite == 0))
    row = (row + bad) * bad
    tl.store(counts_ptr, skipped + bad)
    tl.store(counts_ptr + 1, row)
    tl.store(counts_ptr + 2, tl.maximum(longest, row))
    tl.store(verdict_ptr + BAD, bad)
    tl.store(verdict_ptr + FACTOR, tl.minimum(tl.div_rn(largest, norm + 1e-6), 1.0))
    for start in range(0, moved, WIDTH):
        tensor = start + lane
        inside = tensor < moved
        row_ptr = tensors_ptr + tensor * COLUMNS
        step_ptr = tl.load(row_ptr + STEP, mask=inside, other=0).to(tl.pointer_type(tl.float32))
        option_ptr = options_ptr + tl.load(row_ptr + GROUP, mask=inside, other=0) * OPTIONS
        step = tl.load(step_ptr, mask=inside, other=0.0) + (1.0 - bad)
        mean = _one_minus_exp(step * tl.load(option_ptr + LOG1, mask=inside, other=0.0))
        square = _one_minus_exp(step * tl.load(option_ptr + LOG2, mask=inside, other=0.0))
        tl.store(step_ptr, step, mask=inside)
        tl.store(corrections_ptr + 2 * tensor, mean, mask=inside)
        tl.store(corrections_ptr + 2 * tensor + 1, tl.sqrt_rn(square), mask=inside)


@triton.jit
def _move(
    row_ptr, option_ptr, correction_ptr, verdict_ptr, average_weight, at, inside,
    AVERAGED: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    weight_ptr = _pointer(row_ptr + WEIGHT, DTYPE, BYTES) + at
    mean_ptr, square_ptr = _pointer(row_ptr + MEAN, DTYPE, BYTES) + at, _pointer(row_ptr + SQUARE, DTYPE, BYTES) + at
    weight = _read(weight_ptr, inside, WHOLE)
    mean, square = _read(mean_ptr, inside, WHOLE), _read(square_ptr, inside, WHOLE)
    gradient = _read(_pointer(row_ptr + GRADIENT, DTYPE, BYTES) + at, inside, WHOLE) * tl.load(verdict_ptr + FACTOR)
    counts = tl.broadcast_to(tl.load(verdict_ptr + BAD), at.shape) == 0.0
    lr, beta1, beta2 = tl.load(option_ptr + LR), tl.load(option_ptr + BETA1), tl.load(option_ptr + BETA2)
    # As torch's fused AdamW has it, operation by operation.
    mean = tl.fma(beta1, mean, tl.fma(-beta1, gradient, gradient))
    squared = gradient * gradient
    square = tl.fma(beta2, square, tl.fma(-beta2, squared, squared))
    new = weight - lr * tl.load(option_ptr + DECAY) * weight
    root = tl.div_rn(tl.sqrt_rn(square), tl.load(correction_ptr + 1))
    new -= tl.div_rn(tl.div_rn(lr, tl.load(correction_ptr)) * mean, root + tl.load(option_ptr + EPS))
    kept = counts if WHOLE else inside & counts
    tl.store(weight_ptr, new.to(DTYPE), mask=kept)
    tl.store(mean_ptr, mean.to(DTYPE), mask=kept)
    tl.store(square_ptr, square.to(DTYPE), mask=kept)
    if AVERAGED:
        average_ptr = _pointer(row_ptr + AVERAGE, DTYPE, BYTES) + at
        average = _read(average_ptr, inside, WHOLE)
        weight = tl.where(counts, new.to(DTYPE).to(tl.float32), weight)
        apart = weight - average
        # As torch's lerp: with a weight of 1 the result is exactly the new weight.
        near, far = average + average_weight * apart, weight - apart * (1.0 - average_weight)
        moved = tl.where(average_weight < 0.5, near, far).to(DTYPE)
        if WHOLE:
            tl.store(average_ptr, moved)
        else:
            tl.store(average_ptr, moved, mask=inside)


@triton.jit(do_not_specialize=["first", "average_weight"])
def adamw(
    tensors_ptr, chunks_ptr, options_ptr, corrections_ptr, verdict_ptr, first, average_weight,
    AVERAGED: tl.constexpr, DTYPE: tl.constexpr, BYTES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """AdamW (Loshchilov and Hutter, 2019) of a chunk, unless its step is skipped, then the average of its weights.

    average_weight: of the new weights in their average.
    """
    chunk = first + tl.program_id(0)
    tensor, start = tl.load(chunks_ptr + 2 * chunk), tl.load(chunks_ptr + 2 * chunk + 1) * BLOCK
    row_ptr, correction_ptr = tensors_ptr + tensor * COLUMNS, corrections_ptr + 2 * tensor
    option_ptr = options_ptr + tl.load(row_ptr + GROUP) * OPTIONS
    at, elements = start + tl.arange(0, BLOCK), tl.load(row_ptr + ELEMENTS).to(tl.int32)
    if start + BLOCK <= elements:
        _move(
            row_ptr, option_ptr, correction_ptr, verdict_ptr, average_weight, at, at < elements,
            AVERAGED, DTYPE, BYTES, True,
        )  # fmt: skip
    else:
        _move(
            row_ptr, option_ptr, correction_ptr, verdict_ptr, average_weight, at, at < elements,
            AVERAGED, DTYPE, BYTES, False,
        )  # fmt: skip
