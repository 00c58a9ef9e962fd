"""Correctness, then time, of the GPU kernels: ``python tools/bench_kernels.py [--batch 128] [--channels 384 768]``.

    python tools/bench_kernels.py --json docs/bench_kernels.json
    python tools/bench_kernels.py --plot docs/bench_kernels.json   # draw what an earlier run wrote

Every op is first compared with float64 on a small batch, outputs and all gradients. Times are medians of CUDA graph
replays with the L2 cache flushed before each. The floor of an op is the larger of the bytes it must move over this
GPU's measured copy rate and the exponentials it must take over 16 a clock and multiprocessor; that of a whole block
the sum over its ops, matrix products included (tools/floors.py). Where mamba_ssm and
causal-conv1d are installed, the same is done by them in the same run, their flips and copies included.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import floors
import torch
from floors import Gpu, Op, this_gpu
from rich.console import Console
from rich.table import Table
from torch import Tensor

from vimfast.cli import run_main
from vimfast.errors import UserError
from vimfast.files import write_text
from vimfast_kernels import Direction, MixerWeights, bidirectional_conv1d_silu, bidirectional_scan, check_backend
from vimfast_kernels.block.launch import bidirectional_block
from vimfast_kernels.conv.launch import causal_conv_silu
from vimfast_kernels.conv.reference import conv_silu
from vimfast_kernels.norm.launch import add_norm
from vimfast_kernels.norm.reference import add_rms_norm
from vimfast_kernels.scan import reference as scan_reference
from vimfast_kernels.scan.launch import selective_scan
from vimfast_kernels.tune import milliseconds

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
STATES = 16


class Case(NamedTuple):
    name: str
    kernel: Callable[..., Any]
    plain: Callable[..., Any] | None  # the same in plain torch, or None where its parts are checked by themselves
    inputs: list[Tensor]
    forward: list[Op]  # whose floors are its own
    both: list[Op]  # with backward
    mamba: Callable[..., Any] | None = None  # the same through mamba_ssm or causal-conv1d


def cases(batch: int, length: int, d: int, dtype: torch.dtype) -> list[Case]:
    """The ops of one layer of inner width d, on random inputs of a trained model's scale."""
    torch.manual_seed(0)
    rank, size = -(-d // 32), torch.finfo(dtype).bits // 8
    tokens = batch * length
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
    scan = [floors.scan_forward(tokens, d, size, save=False), floors.scan_backward(tokens, d, size)]
    conv = [floors.convolution(tokens, d, size), floors.convolution_backward(tokens, d, size)]
    norms = [floors.norm(tokens, d // 2, size), floors.norm_backward(tokens, d // 2, size)]
    return [
        Case(
            "scan",
            lambda *v: selective_scan(*v, scale=0.5),
            lambda *v: scan_reference.scan(*v, both, 0.5)[0],
            [u, delta, A, B, C, D, xz[..., d:], bias],
            scan[:1],
            scan,
            lambda *v: bidirectional_scan(*v, scale=0.5, backend="mamba_ssm"),
        ),
        Case(
            "conv + SiLU",
            lambda *v: causal_conv_silu(*v),
            lambda *v: conv_silu(*v, both),
            [xz[..., :d], weight, conv_bias],
            conv[:1],
            conv,
            lambda *v: bidirectional_conv1d_silu(*v, backend="mamba_ssm"),
        ),
        Case(
            "add + RMSNorm",
            lambda *v: add_norm(*v),
            add_rms_norm,
            [h, r, torch.ones(d // 2, **f32)],
            norms[:1],
            norms,
        ),
        Case(
            "block",
            block,
            None,
            [h, r, torch.ones(d // 2, **f32), in_weight, *directions, out_weight],
            floors.layer(tokens, d // 2, size, training=False),
            floors.layer(tokens, d // 2, size, training=True),
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
    return max(float((a.double() - b).norm() / b.norm()) for a, b in zip(outs, exact, strict=True))


def measure(case: Case, error: float | None, gpu: Gpu, flush: Tensor, repeats: int, mamba: bool) -> dict[str, Any]:
    """Times and floors of one op, milliseconds."""
    forward, both = (milliseconds(f, flush, repeats) for f in passes(case.kernel, case.inputs))
    fp32 = case.inputs[0].dtype == torch.float32
    found = {
        "op": case.name,
        "worst_error": error,
        "forward_ms": forward,
        "forward_backward_ms": both,
        "forward_floor_ms": 1e3 * gpu.seconds(case.forward, fp32),
        "forward_backward_floor_ms": 1e3 * gpu.seconds(case.both, fp32),
    }
    if mamba and case.mamba is not None:
        found["mamba_forward_ms"], found["mamba_forward_backward_ms"] = (
            milliseconds(f, flush, repeats) for f in passes(case.mamba, case.inputs)
        )
    return found


def show(figures: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in (
        "op",
        "shape",
        "dtype",
        "forward",
        "floor",
        "x",
        "with backward",
        "floor",
        "x",
        "mamba_ssm",
        "error",
    ):
        table.add_column(column, justify="left" if column in ("op", "shape", "dtype") else "right")
    for f in figures:
        mamba, error = f.get("mamba_forward_backward_ms"), f["worst_error"]
        table.add_row(
            f["op"], "x".join(map(str, f["shape"])), f["dtype"],
            *(
                text
                for ours, floor in (
                    (f["forward_ms"], f["forward_floor_ms"]),
                    (f["forward_backward_ms"], f["forward_backward_floor_ms"]),
                )
                for text in (f"{ours:.3f}", f"{floor:.3f}", f"{ours / floor:.1f}")
            ),
            "" if mamba is None else f"{mamba:.3f}", "its parts'" if error is None else f"{error:.1e}",
        )  # fmt: skip
    Console(width=140).print(table)


def plot(source: Path) -> None:
    """Bars of forward and backward with their floors, as a PNG next to the JSON."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    record = json.loads(source.read_text())
    rows = record["figures"][::-1]
    figure, axes = plt.subplots(figsize=(9, 0.42 * len(rows) + 1.4), layout="constrained")
    for i, f in enumerate(rows):
        axes.barh(i, f["forward_backward_ms"], 0.6, color="#8fc1a9", label="backward" if i == 0 else None)
        axes.barh(i, f["forward_ms"], 0.6, color="#2a7f62", label="forward" if i == 0 else None)
        floor = f["forward_backward_floor_ms"]
        axes.plot([floor, floor], [i - 0.38, i + 0.38], color="black", lw=2, label="floor of both" if i == 0 else None)
        axes.text(f["forward_backward_ms"], i, f" {f['forward_backward_ms']:.3f}", va="center", fontsize=8)
    axes.set_yticks(range(len(rows)), [f"{f['op']}, {'x'.join(map(str, f['shape']))}, {f['dtype']}" for f in rows])
    axes.set_xlabel("milliseconds")
    axes.set_title(f"{record['gpu']}, {record['date']}: ops of one layer, both directions", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right")
    figure.savefig(source.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--length", type=int, default=197)
    parser.add_argument("--channels", type=int, nargs="+", default=[384, 768], help="inner widths: twice the model's")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the figures of this file, as a PNG")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot)
        return
    if not torch.cuda.is_available():
        raise UserError("these kernels need a GPU and there is none here")
    gpu = this_gpu()
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    try:
        mamba = bool(check_backend("mamba_ssm"))
    except ValueError as why:
        mamba = False
        print(f"nothing to compare with: {why}")
    figures = []
    try:
        for name, d in itertools.product(args.dtypes, args.channels):
            errors = [c.plain and worst_error(c) for c in cases(2, args.length, d, DTYPES[name])]
            for case, error in zip(cases(args.batch, args.length, d, DTYPES[name]), errors, strict=True):
                found = measure(case, error, gpu, flush, args.repeats, mamba)
                figures.append({"shape": [args.batch, args.length, d], "dtype": name, **found})
                print(f"{case.name}, {d} channels, {name}: measured", flush=True)
    finally:  # at Ctrl-C what was measured before it
        show(figures, f"{gpu.name}, torch {torch.__version__}, copies {gpu.copy / 1e12:.2f} TB/s; milliseconds")
    if args.json:
        record = {"gpu": gpu.name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "figures": figures}
        write_text(args.json, json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    run_main(main)
