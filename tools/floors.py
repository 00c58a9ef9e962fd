"""What a step cannot be faster than: bytes, exponentials and products of each op, over a GPU's rates.

    python tools/floors.py        # the floors of Vim-Tiny, Small and Base on the GPUs below, on paper

An op's floor is the largest of its three times; ops follow one another, so a step's floor is the sum of theirs.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

STATES, TAPS = 16, 4


@dataclass(frozen=True)
class Gpu:
    """Rates per second."""

    name: str
    copy: float  # bytes moved by a large copy, read and written
    exponentials: float  # 16 a clock and multiprocessor
    products: float  # multiply-adds x 2 of dense matrix products, bf16
    fp32_products: float  # the same in fp32, by the fastest way that a block multiplies

    def seconds(self, ops: list[Op], fp32: bool = False) -> float:
        products = self.fp32_products if fp32 else self.products
        return sum(max(o.moved / self.copy, o.exponentials / self.exponentials, o.flops / products) for o in ops)


@dataclass(frozen=True)
class Op:
    name: str
    moved: float = 0.0  # bytes
    exponentials: float = 0.0
    flops: float = 0.0


# Dense tf32 products of an H100 or H200 SXM by NVIDIA's data sheet; there a block takes three of them for one of fp32.
FP32_OF_TF32 = 494.7e12 / 3


def scaled(name: str, capability: tuple[int, int], multiprocessors: int, clock: float, copy: float) -> Gpu:
    """A GPU by its multiprocessors and clock, products on tensor cores as the H200's scale.

    Args:
        clock: the highest, in cycles a second.
        copy: bytes a second that a large copy moves, as measured.
    """
    share = multiprocessors / 132
    cores = 2 * 128 * multiprocessors * clock  # a multiply-add a clock on each of at most 128
    fp32 = share * FP32_OF_TF32 if capability == (9, 0) else cores
    return Gpu(name, copy, 16 * multiprocessors * clock, share * 790e12, fp32)


H200 = scaled("NVIDIA H200", (9, 0), 132, 1.98e9, 4.1e12)
# Datasheet rates, with the share of the memory's that copies reach on the H200 (0.87).
RTX_4090 = Gpu("NVIDIA GeForce RTX 4090", 0.87 * 1.008e12, 16 * 128 * 2.52e9, 165e12, 82e12)


def this_gpu() -> Gpu:
    """The GPU at hand: memory rate measured, the rest from its multiprocessors and clock."""
    found = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    clock = 1e6 * float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    a, b = torch.empty(2, 1 << 28, dtype=torch.uint8, device="cuda").unbind()
    times = []
    for _ in range(9):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        b.copy_(a)
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    capability, copy = (found.major, found.minor), 2 * a.numel() / sorted(times)[4]
    return scaled(found.name, capability, found.multi_processor_count, clock, copy)


def product(name: str, rows: int, inner: int, outer: int, size: int, count: int = 1) -> Op:
    """[rows, inner] x [inner, outer]."""
    return Op(name, size * count * (rows * (inner + outer) + inner * outer), 0, 2 * count * rows * inner * outer)


def scan_forward(tokens: int, d: int, size: int, save: bool, delta: bool = True) -> Op:
    """u, delta of both directions, z, out, B, C; the sum before the gate where backward follows.

    delta: whether it is read, rather than made inside.
    """
    moved = tokens * size * ((4 + 2 * delta + save) * d + 4 * STATES)
    return Op("scan", moved, 2 * tokens * d * STATES)


def scan_backward(tokens: int, d: int, size: int, delta: bool = True) -> Op:
    moved = tokens * size * ((9 + 2 * delta) * d + 8 * STATES)
    return Op("scan backward", moved, 4 * tokens * d * STATES)


def norm(tokens: int, dim: int, size: int) -> Op:
    return Op("norm", tokens * dim * (2 * size + 8))


def norm_backward(tokens: int, dim: int, size: int, kept: int = 4) -> Op:
    """From rows of `kept` bytes an entry: the fp32 sum, or within a block that normalized."""
    return Op("norm backward", tokens * dim * (2 * size + 8 + kept))


def convolution(tokens: int, d: int, size: int) -> Op:
    return Op("convolution", tokens * d * 3 * size, 2 * tokens * d, 4 * tokens * d * TAPS)


def convolution_backward(tokens: int, d: int, size: int) -> Op:
    return Op("convolution backward", tokens * d * 4 * size, 2 * tokens * d, 12 * tokens * d * TAPS)


def layer(tokens: int, dim: int, size: int, training: bool) -> list[Op]:
    """One block: norm, projections, convolution, scan; with ``training`` its backward pass too."""
    d, rank = 2 * dim, -(-dim // 16)
    fp32 = size == 4
    steps = product("dt", tokens, rank, d, size, 2)
    others = [
        product("in", tokens, dim, 2 * d, size),
        product("x", tokens, d, rank + 2 * STATES, size, 2),
        product("out", tokens, d, dim, size),
    ]
    ops = [
        norm(tokens, dim, size),
        convolution(tokens, d, size),
        scan_forward(tokens, d, size, training, delta=fp32),
        steps if fp32 else Op("dt, in the scan", flops=steps.flops),
        *others,
    ]
    if training:
        ops += [
            norm_backward(tokens, dim, size, kept=size),
            convolution_backward(tokens, d, size),
            scan_backward(tokens, d, size, delta=fp32),
            *(steps, *others),  # the gradient of the input
            *(steps, *others),  # the gradient of the weight
        ]
    return ops


def step(
    batch: int, size: int, dim: int, *, depth: int = 24, patch: int = 16, classes: int = 1000, fp32: bool = False,
    training: bool = True,
) -> list[Op]:  # fmt: skip
    """A whole step of a Vision Mamba of width `dim` on images of `size` pixels."""
    element = 4 if fp32 else 2
    patches = (size // patch) ** 2
    pixels, tokens = 3 * size * size * batch, batch * (patches + 1)
    embed = Op("patches", pixels * (4 + element) + batch * patches * dim * element, 0, 2 * pixels * dim)
    ops = [embed, product("head", batch, dim, classes, element)]
    ops += depth * layer(tokens, dim, element, training)
    if training:
        weights = depth * (dim * 2 * dim * 3 + 2 * 2 * dim * (dim // 16 * 2 + 2 * STATES + TAPS)) + dim * (
            768 + classes
        )
        ops += [embed, Op("update and average", weights * 4 * 10)]
    return ops


def main() -> None:
    table = Table("model, 224 pixels", "GPU", "batch", "training floor, ms", "img/s", title="floors on paper, bf16")
    for name, dim in (("Vim-Tiny", 192), ("Vim-Small", 384), ("Vim-Base", 768)):
        for gpu in (H200, RTX_4090):
            seconds = gpu.seconds(step(128, 224, dim))
            table.add_row(name, gpu.name, "128", f"{1e3 * seconds:.1f}", f"{128 / seconds:,.0f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
