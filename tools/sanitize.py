"""Memory errors and races of the GPU kernels, looked for by NVIDIA's compute-sanitizer (part of the CUDA toolkit).

    python tools/sanitize.py                       # memcheck, racecheck and synccheck
    python tools/sanitize.py --tools racecheck --kernels scan_forward scan_backward

Every kernel of a training step runs on small inputs: those of a layer, forward and backward, in each dtype and state
size, for a full GPU and for few sequences, and the update. Nothing else is launched, since racecheck ends in an
internal error of its own where some of torch's or cuBLAS' kernels run: inputs are made on the CPU, and where a layer
has a product of cuBLAS, random numbers take the place of its result.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass

import torch
from torch import Tensor

from vimfast.cli import run_main
from vimfast.errors import UserError
from vimfast_kernels import Direction, MixerWeights
from vimfast_kernels.block.launch import REVERSE, projection_gradients
from vimfast_kernels.block.packing import Pieces, pack_and_normalize_rows, padded, unpack, write_gradients
from vimfast_kernels.conv import launch as conv
from vimfast_kernels.norm import launch as norms
from vimfast_kernels.norm.launch import Norm
from vimfast_kernels.product.launch import MEASURED, multiply, splits
from vimfast_kernels.scan import launch as scan
from vimfast_kernels.sums import sum_rows
from vimfast_kernels.update.launch import BLOCK, FusedAdamW
from vimfast_kernels.update.tensors import Counts, Judged, Moved, Options

KERNELS = (
    "scan_forward", "scan_backward", "sum_partials", "conv_forward", "conv_backward", "step_gradients", "norm_forward",
    "norm_backward", "pack_and_normalize", "write_all_gradients", "split", "product", "_sum_rows", "sum_squares",
    "judge", "adamw",
)  # fmt: skip
OF_TENSOR_CORES = "split", "product"  # which few GPUs launch
TOOLS = ("memcheck", "racecheck", "synccheck")
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
DEVICE = torch.device("cuda:0")


@dataclass(frozen=True)
class Layer:
    """A layer of `width` channels on `batch` sequences of `length` tokens.

    Args:
        steps: whether step_gradients takes its time steps, as it does not those of fp32 and of wide layers.
    """

    batch: int
    length: int
    width: int
    rank: int
    dtype: torch.dtype = BF16
    states: int = 16
    rms: bool = True
    steps: bool = True


# 64 sequences of Vim-Tiny get the scan's wide programs on an H200, two its narrow ones.
LAYERS = (
    Layer(64, 21, 192, 12),
    Layer(2, 197, 192, 12),
    Layer(2, 45, 384, 24, rms=False),
    Layer(2, 45, 768, 48, steps=False),
    Layer(1, 1, 64, 4),
    Layer(2, 45, 192, 12, FP16),
    Layer(64, 21, 192, 12, FP32, steps=False),
    Layer(2, 45, 192, 12, FP32, steps=False),
    *(Layer(2, 37, 48, 16, dtype, n, steps=dtype != FP32) for dtype in (BF16, FP32) for n in (8, 32, 64)),
)


def draw(*shape: int, dtype: torch.dtype = FP32, scale: float = 1.0, shift: float = 0.0) -> Tensor:
    return (torch.randn(shape) * scale + shift).to(dtype).to(DEVICE)


def project(x: Tensor, weight: Tensor) -> Tensor:
    """x weight by our kernels, or random numbers where they would be cuBLAS'."""
    rows, dtype = x.reshape(-1, x.shape[-1]), x.dtype
    out = multiply(rows, weight) if splits(rows) else draw(len(rows), weight.shape[1], dtype=dtype)
    return out.view(*x.shape[:-1], -1)


def draw_weights(layer: Layer) -> MixerWeights:
    c, d, n, rank = layer.width, 2 * layer.width, layer.states, layer.rank

    def direction() -> Direction:
        return Direction(
            conv_weight=draw(d, 4), conv_bias=draw(d), x_weight=draw(rank + 2 * n, d, scale=d**-0.5),
            dt_weight=draw(d, rank, scale=rank**-0.5), dt_bias=draw(d, shift=-3), A_log=draw(d, n), D=draw(d),
        )  # fmt: skip

    outer = draw(2 * d, c, scale=c**-0.5), draw(2 * d), draw(c, d, scale=d**-0.5), draw(c)
    return MixerWeights(*outer[:2], direction(), direction(), *outer[2:])


def launch_layer(layer: Layer) -> None:
    """What `vimfast_kernels.block.launch` does in a step."""
    b, length, c, n, dtype = layer.batch, layer.length, layer.width, layer.states, layer.dtype
    d, columns = 2 * c, padded(layer.rank) + 2 * n
    weights = draw_weights(layer)
    noise = torch.linspace(0.05, 0.95, b).to(DEVICE)
    norm = Norm(draw(c), None if layer.rms else draw(c), noise, 0.3, 1e-5, layer.rms)
    total = draw(b, length, c)
    incoming = draw(b, length, c, dtype=dtype)
    narrow, wide, normed = pack_and_normalize_rows(weights, norm, incoming, total, total, dtype)
    w = unpack(weights, narrow, wide)
    xz = project(normed.rows, w.in_scaled.t()).contiguous()
    x, z = xz[..., :d], xz[..., d:]
    u = conv.launch_forward(x, w.taps.mT, w.conv_bias, REVERSE)
    x_dbl = torch.stack([project(u[k], w.x_weight[k].t()).cpu() for k in range(2)]).to(DEVICE)
    low, B, C = x_dbl.split([columns - 2 * n, n, n], dim=-1)
    inputs = scan.Inputs(u, low, w.A, B, C, w.D, z, w.dt_bias, REVERSE, 0.5, w.dt_weight)
    scan.launch_forward(inputs, save=False)
    gated, y, states = scan.launch_forward(inputs, save=True)
    project(gated, w.out_weight.t())

    dxz, dx_dbl = torch.empty_like(xz), torch.empty_like(x_dbl)
    du, ddelta, dstates, dparameters = scan.launch_backward_programs(
        draw(b, length, d, dtype=dtype), inputs, y, states, dxz[..., d:], out=gated
    )
    dB, dC = dx_dbl[..., -2 * n :].chunk(2, dim=-1)
    scan.sum_partials(dstates, dB, dC)
    ddt_weight = draw(2, 3, d, columns - 2 * n)
    low_rows = dx_dbl.view(2, b * length, -1)[..., : columns - 2 * n]
    if splits(ddelta):
        multiply(ddelta.view(2, b * length, d), w.dt_weight, out=low_rows)
    if layer.steps:
        ddt_weight = projection_gradients(ddelta, w.dt_weight, x_dbl, dstates, dx_dbl)
    parameters = w.conv_weight, w.conv_bias, REVERSE, dxz[..., :d]
    if columns <= conv.WIDEST_FACTORS or splits(x):
        dconv = conv.launch_backward_of_sum(du, dx_dbl, w.x_weight, x, *parameters)
    else:  # after a product of cuBLAS'
        dconv = conv.launch_backward(du, x, *parameters)
    dx, dresidual = torch.empty_like(incoming), torch.empty_like(total)
    dnormed = project(dxz, w.in_weight).contiguous()
    dnorm = norms.launch_backward(dnormed, draw(b, length, c), normed, norm, dx, dresidual)
    pieces = Pieces(
        in_weight=draw(4, 2 * d, c), in_bias=draw(2 * d), out_weight=draw(8, c, d), out_bias=draw(c),
        x_weight=draw(2, 16, columns, d), dt_weight=ddt_weight, conv=dconv, norm=dnorm, scan=dparameters, A=w.A,
    )  # fmt: skip
    gradients = torch.empty_like(norm.weight), None if norm.bias is None else torch.empty_like(norm.bias)
    write_gradients(pieces, weights, norm, draw_weights(layer), *gradients)


def launch_norm(dtype: torch.dtype) -> None:
    """By itself, as after the last layer."""
    x, total = draw(3, 37, 72, dtype=dtype), draw(3, 37, 72)
    for bias in (None, draw(72)):
        norm = Norm(draw(72), bias, torch.linspace(0.05, 0.95, 3).to(DEVICE), 0.3, 1e-5, bias is None)
        norms.launch_forward(x, total, norm, torch.empty_like(x), total)
        sum_rows(norms.launch_backward(x, total, total, norm, torch.empty_like(x), torch.empty_like(total)))


def launch_scan(dtype: torch.dtype) -> None:
    """By itself: time steps given, no gate, its partial gradients summed over the batch too."""
    b, length, d, n = 3, 37, 80, 16
    long = (2, b, length)
    u, delta, B, C = (draw(*long, columns, dtype=dtype) for columns in (d, d, n, n))
    A = draw(2, d, n).cpu().abs().neg().to(DEVICE)
    inputs = scan.Inputs(u, delta, A, B, C, draw(2, d), None, draw(2, d, shift=-3), REVERSE, 1.0)
    _, y, states = scan.launch_forward(inputs, save=True)
    dB, dC = torch.empty_like(B), torch.empty_like(C)
    scan.launch_backward(draw(b, length, d, dtype=dtype), inputs, y, states, dB, dC, None)


def launch_conv(dtype: torch.dtype) -> None:
    """By itself, of a number of channels that no program divides."""
    b, length, d = 3, 37, 72
    x, weight, bias = draw(b, length, d, dtype=dtype), draw(2, d, 4), draw(2, d)
    conv.launch_forward(x, weight, bias, REVERSE)
    sum_rows(conv.launch_backward(draw(2, b, length, d, dtype=dtype), x, weight, bias, REVERSE, torch.empty_like(x)))


def launch_update(dtype: torch.dtype) -> None:
    """Of parameters of one element, a whole chunk, and one that ends in a third."""
    sizes = 1, BLOCK, 2 * BLOCK + 5
    weights, means, gradients, averages = ([draw(size, dtype=dtype) for size in sizes] for _ in range(4))
    squares = [draw(size, dtype=dtype, scale=0.0, shift=1.0) for size in sizes]
    steps = [draw(scale=0.0) for _ in sizes]
    fused = FusedAdamW(DEVICE)
    moved = Moved(gradients, weights, means, squares, steps, averages, places=range(3), groups=[0, 0, 0])
    if why := fused.locate(moved, Judged([], [])):
        raise ValueError(why)
    counts = Counts(draw(3, scale=0.0), torch.zeros(3, dtype=torch.bool).to(DEVICE))
    fused([Options(1e-3, 0.05, 0.9, 0.999, 1e-8)], counts, average_weight=0.1, largest=1.0)


def launch() -> None:
    torch.manual_seed(0)
    for layer in LAYERS:
        print(layer, flush=True)
        launch_layer(layer)
    for dtype in (BF16, FP16, FP32):
        print(f"scan, convolution and norm by themselves, {dtype}", flush=True)
        launch_scan(dtype)
        launch_conv(dtype)
        launch_norm(dtype)
    for dtype in (FP32, BF16):
        print(f"update, {dtype}", flush=True)
        launch_update(dtype)
    torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tools", nargs="+", choices=TOOLS, default=TOOLS, help="of compute-sanitizer")
    text = f"to watch [all]: {' '.join(KERNELS)}"
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=KERNELS, metavar="KERNEL", help=text)
    parser.add_argument("--launch", action="store_true", help="only launch the kernels, with nothing watching")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("the kernels need a CUDA GPU and there is none here")
    if args.launch:
        launch()
        return
    if torch.cuda.get_device_capability() not in MEASURED and set(args.kernels) <= set(OF_TENSOR_CORES):
        raise UserError(  # before a tool watches nothing, and finds nothing
            f"this GPU launches no {' or '.join(args.kernels)}, which are for compute capability 9.0", "name others too"
        )
    if (sanitizer := shutil.which("compute-sanitizer")) is None:
        raise UserError("compute-sanitizer is not on the PATH; add the bin folder of a CUDA toolkit to it")
    watched = ["--kernel-name", f"regex=^({'|'.join(args.kernels)})"]
    for tool in args.tools:
        words = [sanitizer, "--tool", tool, "--error-exitcode", "1", *watched, sys.executable, __file__, "--launch"]
        # Out of torch's pool, tensors lie side by side, where memcheck does not see that one is left for the next.
        if subprocess.run(words, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode:
            raise UserError(f"{tool} reported the errors above, or could not run")


if __name__ == "__main__":
    run_main(main)
