"""Correctness, then time, of the GPU kernels: ``python tools/bench_kernels.py [--batch 128] [--channels 384 768]``.

Every op is first compared with float64 on a small batch, outputs and all gradients. Times are medians of CUDA graph
replays with the L2 cache flushed before each. The floor of an op is the larger of the bytes it must move over this
GPU's measured copy rate and the exponentials it must take over 16 a clock and multiprocessor.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vimfast_kernels import reference
from vimfast_kernels.conv_triton import causal_conv_silu
from vimfast_kernels.mixer_gluon import bidirectional_block
from vimfast_kernels.norm_triton import add_norm
from vimfast_kernels.scan_gluon import selective_scan
from vimfast_kernels.weights import Direction, MixerWeights

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STATES = 16


class Case(NamedTuple):
    name: str
    kernel: Callable[..., Any]
    plain: Callable[..., Any] | None  # the same in plain torch, or None where its parts are checked by themselves
    inputs: list[Tensor]
    forward_bytes: int
    backward_bytes: int
    exponentials: int  # of a forward pass; backward takes twice as many


def cases(batch: int, length: int, d: int, dtype: torch.dtype) -> list[Case]:
    """The ops of one layer of inner width d, on random inputs of a trained model's scale."""
    torch.manual_seed(0)
    rank, size = -(-d // 32), torch.finfo(dtype).bits // 8
    row, tokens = d * size, batch * length
    on: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    f32: dict[str, Any] = {"device": "cuda"}
    u, delta = torch.randn(2, batch, length, d, **on), torch.randn(2, batch, length, d, **on) / 2
    A = -torch.exp(torch.rand(2, d, STATES, **f32) * 2.5)
    x_dbl = torch.randn(2, batch, length, rank + 2 * STATES, **on)
    B, C = x_dbl[..., rank : rank + STATES], x_dbl[..., rank + STATES :]
    D, bias = torch.randn(2, d, **f32), torch.randn(2, d, **f32) - 3
    xz = torch.randn(batch, length, 2 * d, **on)
    weight, conv_bias = torch.randn(2, d, 4, **f32) / 2, torch.randn(2, d, **f32) / 2
    x_weight, dt_weight = torch.randn(2, rank + 2 * STATES, d, **f32) / 16, torch.randn(2, d, rank, **f32)
    in_weight, out_weight = torch.randn(2 * d, d // 2, **f32) / d**0.5, torch.randn(d // 2, d, **f32) / d**0.5
    directions = [
        x for own in zip(weight, conv_bias, x_weight, dt_weight, bias, (-A).log(), D, strict=True) for x in own
    ]

    def block(x: Tensor, residual: Tensor, norm: Tensor, *w: Tensor) -> tuple[Tensor, Tensor]:
        weights = MixerWeights(w[0], None, Direction(*w[1:8]), Direction(*w[8:15]), w[15], None)
        return bidirectional_block(x, residual, norm, None, weights, dtype=dtype, scale=0.5)

    h, r = torch.randn(batch, length, d // 2, **on), torch.randn(batch, length, d // 2, **f32)
    both = [False, True]
    states = 2 * tokens * 2 * STATES * size  # B and C
    return [
        Case(
            "scan",
            lambda *v: selective_scan(*v, scale=0.5),
            lambda *v: reference.scan(*v, both, 0.5)[0],
            [u, delta, A, B, C, D, xz[..., d:], bias],
            tokens * 6 * row + states,
            tokens * 11 * row + 2 * states,
            2 * tokens * d * STATES,
        ),
        Case(
            "conv + SiLU",
            lambda *v: causal_conv_silu(*v),
            lambda *v: reference.conv_silu(*v, both),
            [xz[..., :d], weight, conv_bias],
            tokens * 3 * row,
            tokens * 4 * row,
            2 * tokens * d,
        ),
        Case(
            "add + RMSNorm",
            lambda *v: add_norm(*v),
            reference.add_rms_norm,
            [h, r, torch.ones(d // 2, **f32)],
            tokens * (d // 2) * (2 * size + 8),
            tokens * (d // 2) * (2 * size + 12),
            0,
        ),
        Case(
            "block",
            block,
            None,
            [h, r, torch.ones(d // 2, **f32), in_weight, *directions, out_weight],
            tokens * (d // 2) * (2 * size + 8),
            tokens * (d // 2) * (2 * size + 12),
            2 * tokens * d * STATES,
        ),
    ]


def listed(x: Any) -> list[Tensor]:
    return list(x) if isinstance(x, tuple) else [x]


def passes(function: Callable[..., Any], inputs: Sequence[Tensor]) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """(forward with what backward needs, forward and backward), with the same gradients each time."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    grads = [torch.randn_like(o) for o in listed(function(*leaves))]
    return lambda: function(*leaves), lambda: torch.autograd.grad(listed(function(*leaves)), leaves, grads)


def worst_error(case: Case) -> float:
    """The largest relative error of an output or gradient against float64."""
    assert case.plain is not None
    leaves = [x.detach().requires_grad_() for x in case.inputs]
    exact_leaves = [x.detach().double().requires_grad_() for x in case.inputs]
    outs, exact = listed(case.kernel(*leaves)), listed(case.plain(*exact_leaves))
    grads = [torch.randn_like(o) for o in outs]
    outs += torch.autograd.grad(outs, leaves, grads)
    exact += torch.autograd.grad(exact, exact_leaves, [g.double() for g in grads])
    return max(((a.double() - b).norm() / b.norm()).item() for a, b in zip(outs, exact, strict=True))


def milliseconds(function: Callable[[], Any], flush: Tensor, repeats: int) -> float:
    """Median time of a graph replay that finds the L2 cache cold."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    return sorted(a.elapsed_time(b) for a, b in times)[repeats // 2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=197)
    parser.add_argument("--channels", type=int, nargs="+", default=[384, 768], help="inner widths: twice the model's")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: no CUDA device here; these kernels need one")
    dtype = DTYPES[args.dtype]
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    gpu = torch.cuda.get_device_properties(0)
    clock = torch.cuda.clock_rate() * 1e6
    other = torch.empty_like(flush)
    copy_rate = 2 * flush.numel() / (milliseconds(lambda: other.copy_(flush), flush, args.repeats) * 1e-3)
    print(f"{gpu.name}, torch {torch.__version__}, copy {copy_rate / 1e12:.2f} TB/s, {args.dtype}, batch {args.batch}")
    figures = []
    for d in args.channels:
        errors = [c.plain and worst_error(c) for c in cases(2, args.length, d, dtype)]
        for case, error in zip(cases(args.batch, args.length, d, dtype), errors, strict=True):
            forward, both = (milliseconds(f, flush, args.repeats) for f in passes(case.kernel, case.inputs))
            exp_rate = 16 * gpu.multi_processor_count * clock
            floors = [
                1e3 * max(moved / copy_rate, taken / exp_rate)
                for moved, taken in (
                    (case.forward_bytes, case.exponentials),
                    (case.backward_bytes, 2 * case.exponentials),
                )
            ]
            figures.append(
                {
                    "op": case.name,
                    "shape": [args.batch, args.length, d],
                    "dtype": args.dtype,
                    "worst_error": error,
                    "forward_ms": round(forward, 4),
                    "forward_backward_ms": round(both, 4),
                    "forward_floor_ms": round(floors[0], 4),
                    "forward_backward_floor_ms": round(sum(floors), 4),
                }
            )
            told = "parts checked above" if error is None else f"worst error {error:.1e}"
            print(
                f"{case.name:14} {args.batch}x{args.length}x{d}: forward {forward:.4f} ms (floor {floors[0]:.4f}),"
                f" with backward {both:.4f} ms (floor {sum(floors):.4f}), {told}",
                flush=True,
            )
    if args.json:
        args.json.write_text(json.dumps({"gpu": gpu.name, "torch": torch.__version__, "figures": figures}, indent=1))


if __name__ == "__main__":
    main()
