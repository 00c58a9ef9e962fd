"""A plan carried out on the GPU: two launches per operation slot, whatever the operations; the last one also erases.

Each program works on a part of one image, so an image's op is a branch that costs the others nothing. Images with
fewer operations than slots sit the first slots out, and read their own first op's input from the batch itself.
Launched without fused multiply-add, the kernels round as Pillow's C code does.
"""

# Device functions are written in Triton's own dialect: no annotations beyond constexpr.
# mypy: allow-untyped-defs, allow-incomplete-defs
from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from vimfast.augment.colours import fill_colour
from vimfast.augment.plan import Op, Plan

_NONE = tl.constexpr(int(Op.NONE))
_INVERT = tl.constexpr(int(Op.INVERT))
_POSTERIZE = tl.constexpr(int(Op.POSTERIZE))
_SOLARIZE = tl.constexpr(int(Op.SOLARIZE))
_SOLARIZE_ADD = tl.constexpr(int(Op.SOLARIZE_ADD))
_BRIGHTNESS = tl.constexpr(int(Op.BRIGHTNESS))
_CONTRAST = tl.constexpr(int(Op.CONTRAST))
_AUTOCONTRAST = tl.constexpr(int(Op.AUTOCONTRAST))
_EQUALIZE = tl.constexpr(int(Op.EQUALIZE))
_COLOR = tl.constexpr(int(Op.COLOR))
_SHARPNESS = tl.constexpr(int(Op.SHARPNESS))
_AFFINE = tl.constexpr(int(Op.AFFINE))
_BOX_X = tl.constexpr(int(Op.BOX_X))
_BOX_Y = tl.constexpr(int(Op.BOX_Y))
_SHIFT = tl.constexpr(int(Op.SHIFT))


@triton.jit
def _argument(op_ptr, i: tl.constexpr):
    return tl.load(op_ptr + 2 + i).to(tl.float64, bitcast=True)


@triton.jit
def _source(images_ptr, before_ptr, op_ptr, slot, size):
    """Where the image of this program's op is: as it came in, or as the slot before left it."""
    at = tl.program_id(0).to(tl.int64) * size
    source = images_ptr + at
    if slot > 0:  # noqa: SIM102, `and` would load all the same
        if tl.load(op_ptr - 8) != _NONE:
            source = before_ptr + at
    return source


@triton.jit
def _grey(r, g, b):
    return (r * 19595 + g * 38470 + b * 7471 + 32768) >> 16


@triton.jit
def _blend(degenerate, v, factor):
    mixed = degenerate.to(tl.float32) + factor * (v - degenerate).to(tl.float32)
    return tl.minimum(tl.maximum(mixed, 0.0), 255.0).to(tl.int32)


@triton.jit(do_not_specialize=["slots", "slot", "pixels"])
def _tables(images_ptr, before_ptr, ops_ptr, tables_ptr, slots, slot, pixels, BLOCK: tl.constexpr):
    # A program makes the table of one channel of one image. tables [B, 3, 256]
    sample, channel = tl.program_id(0), tl.program_id(1)
    op_ptr = ops_ptr + (sample * slots + slot) * 8
    code = tl.load(op_ptr)
    if (code != _NONE) & (code <= _EQUALIZE):
        source = _source(images_ptr, before_ptr, op_ptr, slot, pixels * 3)
        level = tl.arange(0, 256)
        table = 255 - level  # _INVERT
        at = tl.arange(0, BLOCK)
        if code == _POSTERIZE:
            drop = 8 - _argument(op_ptr, 0).to(tl.int32)
            table = (level >> drop) << drop
        elif code == _SOLARIZE:
            table = tl.where(level < _argument(op_ptr, 0).to(tl.int32), level, 255 - level)
        elif code == _SOLARIZE_ADD:
            more = tl.minimum(level + _argument(op_ptr, 0).to(tl.int32), 255)
            table = tl.where(level < 128, more, level)
        elif code == _BRIGHTNESS:
            table = _blend(level * 0, level, _argument(op_ptr, 0).to(tl.float32))
        elif code == _CONTRAST:
            total = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, pixels, BLOCK):
                mask = start + at < pixels
                p = source + (start + at) * 3
                r = tl.load(p, mask=mask, other=0).to(tl.int32)
                g = tl.load(p + 1, mask=mask, other=0).to(tl.int32)
                b = tl.load(p + 2, mask=mask, other=0).to(tl.int32)
                total += _grey(r, g, b)
            mean = ((2 * tl.sum(total.to(tl.int64), 0) + pixels) // (2 * pixels)).to(tl.int32)
            table = _blend(level * 0 + mean, level, _argument(op_ptr, 0).to(tl.float32))
        elif code == _AUTOCONTRAST:
            low, high = tl.full((BLOCK,), 255, tl.int32), tl.zeros((BLOCK,), tl.int32)
            for start in range(0, pixels, BLOCK):
                mask = start + at < pixels
                v = tl.load(source + (start + at) * 3 + channel, mask=mask, other=0).to(tl.int32)
                high = tl.maximum(high, v)
                low = tl.minimum(low, tl.where(mask, v, 255))
            darkest, lightest = tl.min(low, 0), tl.max(high, 0)
            scale = 255.0 / tl.maximum(lightest - darkest, 1).to(tl.float64)
            spread = level.to(tl.float64) * scale + -darkest.to(tl.float64) * scale
            spread = tl.minimum(tl.maximum(spread, 0.0), 255.0)
            table = tl.where(lightest > darkest, spread.to(tl.int32), level)
        elif code == _EQUALIZE:
            count = tl.zeros((256,), tl.int32)
            for start in range(0, pixels, BLOCK):
                mask = start + at < pixels
                v = tl.load(source + (start + at) * 3 + channel, mask=mask, other=0).to(tl.int32)
                count += tl.histogram(v, 256)
            padding = tl.cdiv(pixels, BLOCK) * BLOCK - pixels
            count -= tl.where(level == 0, padding, 0)
            last = tl.sum(tl.where(level == tl.max(tl.where(count > 0, level, 0), 0), count, 0), 0)
            step = (pixels - last) // 255
            below = tl.cumsum(count, 0) - count
            spread = (step // 2 + below) // tl.maximum(step, 1)
            table = tl.where(step > 0, tl.minimum(spread, 255), level)
        tl.store(tables_ptr + (sample * 3 + channel) * 256 + level, table.to(tl.uint8))


@triton.jit
def _cubic(v0, v1, v2, v3, d, cubic):
    """Between v1 and v2, at d in [0, 1): Keys' cubic with a = -1, or a line where `cubic` is 0. Exact where flat."""
    slope = v2 - v1 + cubic * (v1 - v0)
    square = cubic * (2.0 * (v0 - v1) + v2 - v3)
    cube = cubic * (v1 - v0 - v2 + v3)
    return v1 + d * (slope + d * (square + d * cube))


@triton.jit
def _row(row_ptr, x0, x1, x2, x3, d, cubic, mask):
    v0 = tl.load(row_ptr + x0, mask=mask, other=0).to(tl.float32)
    v1 = tl.load(row_ptr + x1, mask=mask, other=0).to(tl.float32)
    v2 = tl.load(row_ptr + x2, mask=mask, other=0).to(tl.float32)
    v3 = tl.load(row_ptr + x3, mask=mask, other=0).to(tl.float32)
    return _cubic(v0, v1, v2, v3, d, cubic)


@triton.jit
def _clip(v, most):
    return tl.minimum(tl.maximum(v, 0), most)


@triton.jit
def _warped(source, x, y, dx, dy, cubic, fill, inside, H: tl.constexpr, W: tl.constexpr):
    x0, x1, x2, x3 = _clip(x - 1, W - 1), _clip(x, W - 1), _clip(x + 1, W - 1), _clip(x + 2, W - 1)
    x0, x1, x2, x3 = x0 * 3, x1 * 3, x2 * 3, x3 * 3
    v0 = _row(source + _clip(y - 1, H - 1) * W * 3, x0, x1, x2, x3, dx, cubic, inside)
    v1 = _row(source + _clip(y, H - 1) * W * 3, x0, x1, x2, x3, dx, cubic, inside)
    v2 = _row(source + _clip(y + 1, H - 1) * W * 3, x0, x1, x2, x3, dx, cubic, inside)
    v3 = _row(source + _clip(y + 2, H - 1) * W * 3, x0, x1, x2, x3, dx, cubic, inside)
    v = _cubic(v0, v1, v2, v3, dy, cubic)
    return tl.where(inside, tl.minimum(tl.maximum(v, 0.0), 255.0).to(tl.int32), fill)


@triton.jit
def _smoothed(source, x, y, v, mask, H: tl.constexpr, W: tl.constexpr):
    """Rows (1 1 1, 1 5 1, 1 1 1) / 13, rounded to nearest; the border as it is."""
    total = 4 * v
    for i in tl.static_range(3):
        for j in tl.static_range(3):
            at = _clip(y + (i - 1), H - 1) * W + _clip(x + (j - 1), W - 1)
            total += tl.load(source + at * 3, mask=mask, other=0).to(tl.int32)
    inner = (x > 0) & (x < W - 1) & (y > 0) & (y < H - 1)
    return tl.where(inner, (2 * total + 13) // 26, v)


@triton.jit
def _running_mean(source, at, step, most, radius, whole, weight, far_weight, mask):
    """Mean over `at` +- radius along one line, which starts at `source` and holds `most` + 1 pixels `step` apart.

    In Pillow's 24-bit fixed point.
    """
    left = tl.load(source + _clip(at - whole - 1, most) * step, mask=mask, other=0).to(tl.int64)
    right = tl.load(source + _clip(at + whole + 1, most) * step, mask=mask, other=0).to(tl.int64)
    total = tl.zeros_like(left)
    for i in range(-whole, whole + 1):
        total += tl.load(source + _clip(at + i, most) * step, mask=mask, other=0).to(tl.int64)
    return ((total * weight + (left + right) * far_weight + 8388608) >> 24).to(tl.int32)


@triton.jit
def _mirrored(at, most):
    at = tl.abs(at)
    return tl.minimum(at, 2 * most - at)


@triton.jit(do_not_specialize=["slots", "slot", "patches"])
def _apply(
    images_ptr, before_ptr, after_ptr, out_ptr, ops_ptr, patches_ptr, tables_ptr, slots, slot, patches,
    fill_r, fill_g, fill_b, mean_r, mean_g, mean_b, std_r, std_g, std_b,
    H: tl.constexpr, W: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # A program changes BLOCK pixels of one image. images, before, after [B, H, W, 3]; out [B, 3, H, W]
    sample = tl.program_id(0)
    op_ptr = ops_ptr + (sample * slots + slot) * 8
    code = tl.load(op_ptr)
    if not LAST:  # noqa: SIM102, settled when the kernel is compiled
        if code == _NONE:
            return
    source = _source(images_ptr, before_ptr, op_ptr, slot, H * W * 3)
    at = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = at < H * W
    y, x = at // W, at % W
    r = tl.load(source + at * 3, mask=mask, other=0).to(tl.int32)
    g = tl.load(source + at * 3 + 1, mask=mask, other=0).to(tl.int32)
    b = tl.load(source + at * 3 + 2, mask=mask, other=0).to(tl.int32)
    if code != _NONE:
        if code <= _EQUALIZE:
            table = tables_ptr + sample * 768
            r = tl.load(table + r).to(tl.int32)
            g = tl.load(table + 256 + g).to(tl.int32)
            b = tl.load(table + 512 + b).to(tl.int32)
        elif code == _COLOR:
            grey = _grey(r, g, b)
            factor = _argument(op_ptr, 0).to(tl.float32)
            r, g, b = _blend(grey, r, factor), _blend(grey, g, factor), _blend(grey, b, factor)
        elif code == _SHARPNESS:
            factor = _argument(op_ptr, 0).to(tl.float32)
            r = _blend(_smoothed(source, x, y, r, mask, H, W), r, factor)
            g = _blend(_smoothed(source + 1, x, y, g, mask, H, W), g, factor)
            b = _blend(_smoothed(source + 2, x, y, b, mask, H, W), b, factor)
        elif code == _AFFINE:
            # In float64 as in Pillow: whether a pixel comes from outside must not depend on rounding.
            xc, yc = x.to(tl.float64) + 0.5, y.to(tl.float64) + 0.5
            xs = _argument(op_ptr, 0) * xc + _argument(op_ptr, 1) * yc + _argument(op_ptr, 2)
            ys = _argument(op_ptr, 3) * xc + _argument(op_ptr, 4) * yc + _argument(op_ptr, 5)
            inside = mask & (xs >= 0) & (xs < W) & (ys >= 0) & (ys < H)
            xs, ys = xs - 0.5, ys - 0.5
            xf, yf = tl.floor(xs), tl.floor(ys)
            dx, dy = (xs - xf).to(tl.float32), (ys - yf).to(tl.float32)
            xi, yi = xf.to(tl.int32), yf.to(tl.int32)
            cubic = tl.load(op_ptr + 1).to(tl.float32)
            r = _warped(source, xi, yi, dx, dy, cubic, fill_r, inside, H, W)
            g = _warped(source + 1, xi, yi, dx, dy, cubic, fill_g, inside, H, W)
            b = _warped(source + 2, xi, yi, dx, dy, cubic, fill_b, inside, H, W)
        elif code == _SHIFT:
            xs = _mirrored(x + _argument(op_ptr, 0).to(tl.int32), W - 1)
            ys = _mirrored(y + _argument(op_ptr, 1).to(tl.int32), H - 1)
            p = source + (ys * W + xs) * 3
            r = tl.load(p, mask=mask, other=0).to(tl.int32)
            g = tl.load(p + 1, mask=mask, other=0).to(tl.int32)
            b = tl.load(p + 2, mask=mask, other=0).to(tl.int32)
        else:  # _BOX_X, _BOX_Y
            radius = _argument(op_ptr, 0).to(tl.float32)
            whole = radius.to(tl.int32)
            weight = (16777216.0 / (radius * 2.0 + 1.0)).to(tl.int64)
            far_weight = (16777216 - (whole * 2 + 1) * weight) // 2
            line, place, step, most = source + y * (W * 3), x, 3, W - 1
            if code == _BOX_Y:
                line, place, step, most = source + x * 3, y, W * 3, H - 1
            r = _running_mean(line, place, step, most, radius, whole, weight, far_weight, mask)
            g = _running_mean(line + 1, place, step, most, radius, whole, weight, far_weight, mask)
            b = _running_mean(line + 2, place, step, most, radius, whole, weight, far_weight, mask)
    if LAST:
        vr, vg, vb = (r - mean_r) / std_r, (g - mean_g) / std_g, (b - mean_b) / std_b
        first_row, last_row = tl.program_id(1) * BLOCK // W, (tl.program_id(1) * BLOCK + BLOCK - 1) // W
        for i in range(patches):
            patch = patches_ptr + (sample * patches + i) * 8
            top, bottom = tl.load(patch), tl.load(patch + 1)
            if (first_row < bottom) & (last_row >= top):
                erased = (y >= top) & (y < bottom) & (x >= tl.load(patch + 2)) & (x < tl.load(patch + 3))
                seed = tl.load(patch + 4)
                er = tl.zeros((BLOCK,), tl.float32) + tl.load(patch + 5).to(tl.float64, bitcast=True).to(tl.float32)
                eg = tl.zeros((BLOCK,), tl.float32) + tl.load(patch + 6).to(tl.float64, bitcast=True).to(tl.float32)
                eb = tl.zeros((BLOCK,), tl.float32) + tl.load(patch + 7).to(tl.float64, bitcast=True).to(tl.float32)
                if seed >= 0:
                    er, eg, eb, _ = tl.randn4x(seed, at)
                vr, vg, vb = tl.where(erased, er, vr), tl.where(erased, eg, vg), tl.where(erased, eb, vb)
        out = out_ptr + sample.to(tl.int64) * (H * W * 3) + at
        tl.store(out, vr.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + H * W, vg.to(out_ptr.dtype.element_ty), mask=mask)
        tl.store(out + 2 * H * W, vb.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        p = after_ptr + sample.to(tl.int64) * (H * W * 3) + at * 3
        tl.store(p, r.to(tl.uint8), mask=mask)
        tl.store(p + 1, g.to(tl.uint8), mask=mask)
        tl.store(p + 2, b.to(tl.uint8), mask=mask)


BLOCK, WARPS = 256, 4  # of a program that changes pixels
TABLE_BLOCK, TABLE_WARPS = 8192, 8  # of one that looks through a channel


def carry_out(images: Tensor, plan: Plan, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype) -> Tensor:
    """:func:`vimfast.augment.pixels.carry_out` on the current stream of the images' device; the host does not wait."""
    batch, height, width, _ = images.shape
    images = images.contiguous()
    out = images.new_empty((batch, 3, height, width), dtype=dtype)
    if not batch:
        return out
    slots, patches = plan.operations.shape[1], plan.patches.shape[1]
    operations, erased = _to_device(plan, images.device)
    tables = images.new_empty((batch, 3, 256))
    buffers = [torch.empty_like(images) for _ in range(min(2, slots - 1))] or [images]
    codes = plan.operations["code"]
    has_table = ((codes != Op.NONE) & (codes <= Op.EQUALIZE)).any(axis=0)
    colours = [*fill_colour(mean), *(255 * value for value in mean), *(255 * value for value in std)]
    for slot in range(slots):
        before, after = buffers[(slot - 1) % len(buffers)], buffers[slot % len(buffers)]
        if has_table[slot]:
            _tables[(batch, 3)](
                images, before, operations, tables, slots, slot, height * width,
                BLOCK=TABLE_BLOCK, num_warps=TABLE_WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        _apply[(batch, triton.cdiv(height * width, BLOCK))](
            images, before, after, out, operations, erased, tables, slots, slot, patches, *colours,
            H=height, W=width, LAST=slot == slots - 1, BLOCK=BLOCK, num_warps=WARPS, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def _to_device(plan: Plan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Operations and patches as rows of eight int64, in one copy."""
    rows = torch.from_numpy(np.concatenate([np.ascontiguousarray(part).view("i8").reshape(-1) for part in plan]))
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    operations, patches = rows.split([8 * plan.operations.size, 8 * plan.patches.size])
    return operations, patches
