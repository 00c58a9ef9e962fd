"""The products of a block: torch's, except fp32's with weights where the tensor cores can make them, see `splits`.

A value is a tf32 number, rounded to nearest, and a rest. Products of the first parts, and of each with the other's
rest, summed in fp32, are as accurate as products on the CUDA cores: those of two rests are below fp32's rounding.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from vimfast_kernels.product.device import product, split
from vimfast_kernels.tuning import Products, tuning_of

# Compute capabilities on which this was measured. It takes tensor cores that multiply tf32 eight times as fast as the
# CUDA cores do fp32; on GeForce cards it is twice at most, and three products are slower than one.
MEASURED = ((9, 0),)
SHORTEST = 16  # terms of a sum: in shorter ones the terms left out would count, and there is little to gain
SPLIT = 32  # rows and columns of weights that a program splits


class Tile(NamedTuple):
    """Of a program."""

    rows: int
    columns: int  # of a panel
    panels: int
    inner: int  # entries of the sum at a time
    warps: int
    stages: int


def splits(x: Tensor) -> bool:
    """Whether products of x run as three of tf32 parts: fp32 that the user has not given up for TF32."""
    return x.dtype == torch.float32 and _has_fast_tf32(x.device) and not _allows_tf32()


def _allows_tf32() -> bool:
    matmul: Any = torch.backends.cuda.matmul
    try:
        return bool(matmul.fp32_precision == "tf32")
    except AttributeError:  # torch before 2.9
        return bool(matmul.allow_tf32)


@functools.cache
def _has_fast_tf32(device: torch.device) -> bool:
    # Tensors on the CPU get here in Triton's interpreter only.
    return device.type != "cuda" or torch.cuda.get_device_capability(device) in MEASURED


def tile_of(n: int, k: int) -> Tile:
    """For n columns and sums of k entries."""
    inner = 16 if k == 16 or k % 32 == 16 else 32
    stages = 3 if k > inner else 1
    if n <= 64:
        return Tile(128, max(16, triton.next_power_of_2(n)), 1, inner, 4, stages)
    if n == 192:
        return Tile(128, 64, 3, inner, 8, stages)
    return Tile(64, 128, 1, inner, 4, min(stages, 2))


def multiply(a: Tensor, w: Tensor, bias: Tensor | None = None, out: Tensor | None = None, add: bool = False) -> Tensor:
    """a w (+ bias) of matrices a [m, K] and w [K, N], or (without bias) of stacks of them; with add, plus out.

    Written into out where there is one. Rows of a and out may lie further apart than they are long.
    """
    if not splits(a) or a.shape[-1] < SHORTEST:
        return _torchs(a, w, bias, out, add)
    m, k = a.shape[-2:]
    n = w.shape[-1]
    count = a.shape[0] if a.dim() == 3 else 1
    if out is None:
        out = a.new_empty(*a.shape[:-1], n)
    a_batch, w_batch, c_batch = (x.stride(0) if x.dim() == 3 else 0 for x in (a, w, out))
    high, low = w.new_empty(2, count, n, k)
    split[(triton.cdiv(n, SPLIT), triton.cdiv(k, SPLIT), count)](
        w, high, low, w.stride(-2), w.stride(-1), w_batch, N=n, K=k, COLUMNS=SPLIT, INNER=SPLIT
    )
    tile = tile_of(n, k)
    tiles = triton.cdiv(n, tile.columns * tile.panels) * triton.cdiv(m, tile.rows)
    product[(tiles, count)](
        a, high, low, bias, out, m, a.stride(-2), a_batch, out.stride(-2), c_batch,
        N=n, K=k, ROWS=tile.rows, COLUMNS=tile.columns, PANELS=tile.panels, INNER=tile.inner, ADD=add,
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return out


def _torchs(a: Tensor, w: Tensor, bias: Tensor | None, out: Tensor | None, add: bool) -> Tensor:
    if add and out is not None:
        return torch.baddbmm(out, a, w, out=out)
    if bias is not None:
        return torch.addmm(bias, a, w, out=out)
    return torch.bmm(a, w, out=out) if a.dim() == 3 else torch.mm(a, w, out=out)


def parts_of(entries: int, choice: Products) -> int:
    """Into how many products a gradient of so many entries is split: the nearest power of two."""
    return int(min(choice.most, 2 ** max(0, round(math.log2(choice.side / math.sqrt(entries))))))


def sum_of_products(a: Tensor, b: Tensor) -> Tensor:
    """Pieces [k, parts, p, q], fp32, whose sum is a^T b [k, p, q] of a [k, m, p] and b [k, m, q]."""
    k, m, p = a.shape
    tuning = tuning_of(a.device)
    choice = tuning.products_fp32 if a.dtype == torch.float32 else tuning.products
    parts = math.gcd(m, parts_of(k * p * b.shape[2], choice))
    a, b = a.view(k * parts, m // parts, p).transpose(1, 2), b.view(k * parts, m // parts, -1)
    pieces = torch.bmm(a, b) if a.dtype == torch.float32 else torch.bmm(a, b, out_dtype=torch.float32)
    return pieces.view(k, parts, p, -1)
