"""Crops resized on the GPU in three launches: the filters' weights, then rows, then columns, with 8 bits in between.

The arithmetic is that of Pillow's ``libImaging/Resample.c``: weights in float64, rounded to 22 bits after the point,
sums in int32, rows before columns. The weights are worked out once for each place of each crop, and not once for each
pixel: float64 is slow on many GPUs. Between rows and columns a pixel is a word of its own, red lowest, so that it is
stored and loaded in one go. The mirror image is made where rows are stored, because it costs nothing there.
"""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vimfast.image_size import ImageSize

# What is known of a crop, a row of int64: the address of its box, the bytes from one row of the image to the next, the
# height and width of the box, their ratios to those of the crop (float64), the most taps of a filter down and across, 1
# for bicubic, 1 to mirror, where its weights begin (int32) and where its resized rows do (words).
_FIELDS = tl.constexpr(12)
_SOURCE, _STRIDE, _HEIGHT, _WIDTH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)
_SCALE_Y, _SCALE_X, _TAPS_Y, _TAPS_X = tl.constexpr(4), tl.constexpr(5), tl.constexpr(6), tl.constexpr(7)
_CUBIC, _MIRROR, _TABLE, _SCRATCH = tl.constexpr(8), tl.constexpr(9), tl.constexpr(10), tl.constexpr(11)
_BITS = tl.constexpr(22)  # Pillow's PRECISION_BITS for 8-bit images
_HALF = tl.constexpr(1 << 21)


@triton.jit
def _filter(x, cubic):
    x = tl.abs(x)
    near = ((1.5 * x - 2.5) * x) * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5
    smooth = tl.where(x < 1.0, near, tl.where(x < 2.0, far, 0.0))
    return tl.where(cubic != 0, smooth, tl.where(x < 1.0, 1.0 - x, 0.0))


@triton.jit
def _weights(crops_ptr, tables_ptr, H: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr):
    # A program makes BLOCK columns of one table, which is int32 [2 + taps, S]: first pixel, number of pixels, weights.
    # A crop has two: of its rows' filter, where S is W, then of its columns', where S is H.
    crop_ptr, vertical = crops_ptr + tl.program_id(0) * _FIELDS, tl.program_id(1)
    cubic = tl.load(crop_ptr + _CUBIC)
    table_ptr = tables_ptr + tl.load(crop_ptr + _TABLE)
    taps = tl.load(crop_ptr + _TAPS_X).to(tl.int32)
    if vertical != 0:
        table_ptr += (2 + taps) * W
    S = tl.where(vertical != 0, H, W)
    taps = tl.load(crop_ptr + _TAPS_X - vertical).to(tl.int32)
    length = tl.load(crop_ptr + _WIDTH - vertical).to(tl.int32)
    scale = tl.load(crop_ptr + _SCALE_X - vertical).to(tl.float64, bitcast=True)
    stretch = tl.maximum(scale, 1.0)
    support = tl.where(cubic != 0, 2.0 * stretch, stretch)
    narrow = 1.0 / stretch
    at = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = at < S
    center = (tl.minimum(at, S - 1).to(tl.float64) + 0.5) * scale
    first = tl.maximum((center - support + 0.5).to(tl.int32), 0)
    count = tl.minimum((center + support + 0.5).to(tl.int32), length) - first
    total = tl.zeros((BLOCK,), tl.float64)
    for t in range(taps):
        weight = _filter(((first + t).to(tl.float64) - center + 0.5) * narrow, cubic)
        total += tl.where(t < count, weight, 0.0)
    tl.store(table_ptr + at, first, mask=inside)
    tl.store(table_ptr + S + at, tl.minimum(count, taps), mask=inside)
    row_ptr = table_ptr + 2 * S + at
    for t in range(taps):
        weight = _filter(((first + t).to(tl.float64) - center + 0.5) * narrow, cubic) / total
        fixed = (weight * 4194304.0 + tl.where(weight < 0.0, -0.5, 0.5)).to(tl.int32)
        tl.store(row_ptr + t * S, tl.where(t < count, fixed, 0), mask=inside)


@triton.jit
def _rounded(total):
    return tl.minimum(tl.maximum(total >> _BITS, 0), 255)


@triton.jit
def _four_bytes(low, high, shift):
    """The bytes from bit `shift` of `low` on, 0 to 24, then of `high`."""
    return (((high.to(tl.uint32).to(tl.uint64) << 32) | low.to(tl.uint32).to(tl.uint64)) >> shift).to(tl.uint32)


@triton.jit
def _resize_rows(
    crops_ptr, tables_ptr, scratch_ptr,
    W: tl.constexpr, PITCH: tl.constexpr, STRIPS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program makes COLUMNS columns of every STRIPS-th block of ROWS rows of one crop: a thread's rows share weights.
    # Pixels of three bytes are read as words: four of them are three words, or parts of four, and the next four begin
    # in the last one.
    BLOCKS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS
    block, strip = tl.program_id(0) % BLOCKS, tl.program_id(0) // BLOCKS % STRIPS
    crop_ptr = crops_ptr + tl.program_id(0) // (BLOCKS * STRIPS) * _FIELDS
    height = tl.load(crop_ptr + _HEIGHT).to(tl.int32)
    stride = tl.load(crop_ptr + _STRIDE)
    address = tl.load(crop_ptr + _SOURCE)
    scratch = scratch_ptr + tl.load(crop_ptr + _SCRATCH)
    table = tables_ptr + tl.load(crop_ptr + _TABLE)
    x = block * COLUMNS + tl.arange(0, COLUMNS)
    inside = x < W
    first = tl.load(table + x, mask=inside, other=0)
    count = tl.load(table + W + x, mask=inside, other=0)
    most = tl.max(count, 0)
    to = tl.where(tl.load(crop_ptr + _MIRROR) != 0, W - 1 - x, x)
    for top in range(strip * ROWS, height, STRIPS * ROWS):
        y = top + tl.arange(0, ROWS)
        start = address + tl.minimum(y, height - 1)[:, None] * stride + first[None, :] * 3
        shift = ((start & 3) * 8).to(tl.uint64)
        # Words that hold no byte of the filter are not read: there may be no memory.
        words = ((start & 3).to(tl.int32) + count[None, :] * 3 + 3) >> 2
        p = (start & -4).to(tl.pointer_type(tl.uint32))
        weights = table + 2 * W + x
        r = tl.full((ROWS, COLUMNS), _HALF, tl.int32)
        g, b = r, r
        w0 = tl.load(p, mask=words > 0, other=0)
        for t in range(0, most, 4):
            w1 = tl.load(p + 1, mask=words > 1, other=0)
            w2 = tl.load(p + 2, mask=words > 2, other=0)
            w3 = tl.load(p + 3, mask=words > 3, other=0)
            a0, a1 = _four_bytes(w0, w1, shift).to(tl.int32), _four_bytes(w1, w2, shift).to(tl.int32)
            a2 = _four_bytes(w2, w3, shift).to(tl.int32)
            weight = tl.load(weights, mask=t < count, other=0)[None, :]
            r += (a0 & 255) * weight
            g += ((a0 >> 8) & 255) * weight
            b += ((a0 >> 16) & 255) * weight
            weight = tl.load(weights + W, mask=t + 1 < count, other=0)[None, :]
            r += ((a0 >> 24) & 255) * weight
            g += (a1 & 255) * weight
            b += ((a1 >> 8) & 255) * weight
            weight = tl.load(weights + 2 * W, mask=t + 2 < count, other=0)[None, :]
            r += ((a1 >> 16) & 255) * weight
            g += ((a1 >> 24) & 255) * weight
            b += (a2 & 255) * weight
            weight = tl.load(weights + 3 * W, mask=t + 3 < count, other=0)[None, :]
            r += ((a2 >> 8) & 255) * weight
            g += ((a2 >> 16) & 255) * weight
            b += ((a2 >> 24) & 255) * weight
            w0 = w3
            words -= 3
            p += 3
            weights += 4 * W
        pixel = _rounded(r) | (_rounded(g) << 8) | (_rounded(b) << 16)
        tl.store(scratch + y[:, None] * PITCH + to[None, :], pixel, mask=(y < height)[:, None] & inside[None, :])


@triton.jit
def _resize_columns(
    crops_ptr, tables_ptr, scratch_ptr, out_ptr,
    H: tl.constexpr, W: tl.constexpr, PITCH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A program makes a tile of one crop. out: uint8 [n, H, W, 3], as words where W is a multiple of four.
    ACROSS: tl.constexpr = (W + COLUMNS - 1) // COLUMNS
    DOWN: tl.constexpr = (H + ROWS - 1) // ROWS
    block, strip = tl.program_id(0) % ACROSS, tl.program_id(0) // ACROSS % DOWN
    crop = tl.program_id(0) // (ACROSS * DOWN)
    crop_ptr = crops_ptr + crop * _FIELDS
    taps = tl.load(crop_ptr + _TAPS_X).to(tl.int32)
    table = tables_ptr + tl.load(crop_ptr + _TABLE) + (2 + taps) * W
    scratch = scratch_ptr + tl.multiple_of(tl.load(crop_ptr + _SCRATCH), 4)
    y, x = strip * ROWS + tl.arange(0, ROWS), block * COLUMNS + tl.arange(0, COLUMNS)
    inside = y < H
    first = tl.load(table + y, mask=inside, other=0)
    count = tl.load(table + H + y, mask=inside, other=0)
    most = tl.max(count, 0)
    p = scratch + first[:, None] * PITCH + x[None, :]
    weights = table + 2 * H + y
    r = tl.full((ROWS, COLUMNS), _HALF, tl.int32)
    g, b = r, r
    for t in range(most):
        weight = tl.load(weights, mask=inside, other=0)[:, None]
        pixel = tl.load(p, mask=(t < count)[:, None] & (x < PITCH)[None, :])
        r += (pixel & 255) * weight
        g += ((pixel >> 8) & 255) * weight
        b += ((pixel >> 16) & 255) * weight
        p += PITCH
        weights += H
    r, g, b = _rounded(r), _rounded(g), _rounded(b)
    row = crop.to(tl.int64) * H + y
    if W % 4 == 0:
        # Four pixels are three words.
        pixels = tl.reshape(r | (g << 8) | (b << 16), (ROWS, COLUMNS // 4, 2, 2))
        even, odd = tl.split(pixels)
        p0, p2 = tl.split(even)
        p1, p3 = tl.split(odd)
        four = block * (COLUMNS // 4) + tl.arange(0, COLUMNS // 4)
        out = out_ptr + row[:, None] * (W // 4 * 3) + four[None, :] * 3
        mask = inside[:, None] & (four < W // 4)[None, :]
        tl.store(out, p0 | (p1 << 24), mask=mask)
        tl.store(out + 1, (p1 >> 8) | (p2 << 16), mask=mask)
        tl.store(out + 2, (p2 >> 16) | (p3 << 8), mask=mask)
    else:
        out = out_ptr + row[:, None] * (W * 3) + x[None, :] * 3
        mask = inside[:, None] & (x < W)[None, :]
        tl.store(out, r.to(tl.uint8), mask=mask)
        tl.store(out + 1, g.to(tl.uint8), mask=mask)
        tl.store(out + 2, b.to(tl.uint8), mask=mask)


TABLE_BLOCK = 128  # places of a program that makes weights
ACROSS = (4, 32, 1)  # rows and columns of a tile, and warps, of a program that resizes rows; found by trying (an H200)
DOWN = (8, 32, 1)  # of one that resizes columns
STRIPS = 16  # programs that share the rows of a crop


def crop_resize(
    addresses: np.ndarray,
    sizes: np.ndarray,
    which: np.ndarray,
    boxes: np.ndarray,
    mirror: np.ndarray,
    cubic: np.ndarray,
    size: ImageSize,
    device: torch.device,
) -> Tensor:
    """:func:`vimfast.augment.resize.crop_resize_at` on the current stream; arguments are checked there."""
    n = len(which)
    out = torch.empty((n, *size, 3), dtype=torch.uint8, device=device)
    if not n:
        return out
    pitch = -(-size.width // 4) * 4  # so that four words can be loaded at once
    fields, weights, words = _describe(addresses, sizes, which, boxes, mirror, cubic, size, pitch)
    crops = torch.from_numpy(fields)
    if device.type == "cuda":
        crops = crops.pin_memory().to(device, non_blocking=True)
    tables = torch.empty(weights, dtype=torch.int32, device=device)
    scratch = torch.empty(words, dtype=torch.int32, device=device)
    _weights[(n, 2, triton.cdiv(max(size), TABLE_BLOCK))](
        crops, tables, H=size.height, W=size.width, BLOCK=TABLE_BLOCK, num_warps=4, enable_fp_fusion=False
    )
    rows, columns, warps = ACROSS
    _resize_rows[(n * triton.cdiv(size.width, columns) * STRIPS,)](
        crops, tables, scratch, W=size.width, PITCH=pitch, STRIPS=STRIPS, ROWS=rows, COLUMNS=columns, num_warps=warps
    )
    rows, columns, warps = DOWN
    _resize_columns[(n * triton.cdiv(size.width, columns) * triton.cdiv(size.height, rows),)](
        crops, tables, scratch, out.view(-1).view(torch.int32) if size.width % 4 == 0 else out,
        H=size.height, W=size.width, PITCH=pitch, ROWS=rows, COLUMNS=columns, num_warps=warps,
    )  # fmt: skip
    return out


def _describe(
    addresses: np.ndarray,
    sizes: np.ndarray,
    which: np.ndarray,
    boxes: np.ndarray,
    mirror: np.ndarray,
    cubic: np.ndarray,
    size: ImageSize,
    pitch: int,
) -> tuple[np.ndarray, int, int]:
    """The crops' rows of fields, int64 [n, 12]; then int32 of all tables and words of all scratch."""
    corner, extent = boxes[:, :2].astype(np.int64), boxes[:, 2:].astype(np.int64)
    scale = extent / size
    # One more than a filter covers: rounding may put both its ends on a pixel, whose weight is then 0.
    taps = np.ceil(np.where(cubic, 4, 2)[:, None] * np.maximum(scale, 1)).astype(np.int64) + 1
    rows = np.empty((len(which), 12), np.int64)
    rows[:, 1] = 3 * sizes[which, 1]
    rows[:, 0] = addresses[which] + corner[:, 0] * rows[:, 1] + 3 * corner[:, 1]
    rows[:, 2:4] = extent
    rows[:, 4:6] = scale.view(np.int64)
    rows[:, 6:8] = taps
    rows[:, 8] = cubic
    rows[:, 9] = mirror
    ends = np.cumsum(np.stack([(taps + 2) @ np.array(size), pitch * extent[:, 0]], axis=1), axis=0)
    rows[0, 10:] = 0
    rows[1:, 10:] = ends[:-1]
    return rows, int(ends[-1, 0]), int(ends[-1, 1])
