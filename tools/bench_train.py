"""Whole training and inference steps on synthetic pictures: images a second, milliseconds, peak memory.

    python tools/bench_train.py                                     # Vim-Tiny, 224, batch 128, bf16
    python tools/bench_train.py --model vim_small_patch16_224 --backend reference --no-graph

A training step is forward, backward, fused AdamW and the weight average. ``graph`` replays the whole step as one CUDA
graph: what the GPU needs when it never waits for the host.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from timm.optim import param_groups_weight_decay
from timm.utils import ModelEmaV3

from vimfast.cli import run_main
from vimfast.errors import UserError
from vimfast.models import create_model


def milliseconds(step: Callable[[], object], repeats: int) -> float:
    """Median time of one call, device work included, after warm-up; calls are not waited for one by one."""
    for _ in range(5):
        step()
    torch.cuda.synchronize()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(max(repeats // 5, 1)):
            step()
        torch.cuda.synchronize()
        times.append((time.perf_counter() - begin) / max(repeats // 5, 1))
    return 1000 * statistics.median(times)


def as_graph(step: Callable[[], object]) -> Callable[[], object]:
    """`step` captured once and replayed from then on."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def training_step(args: argparse.Namespace) -> Callable[[], object]:
    model = create_model(args.model, img_size=args.input_size, scan_backend=args.backend).cuda().train()
    ema = ModelEmaV3(model, decay=0.99996)
    groups = param_groups_weight_decay(model, 0.05)
    optimizer = torch.optim.AdamW(groups, lr=torch.tensor(5e-4, device="cuda"), fused=True, capturable=True)
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device="cuda")
    targets = torch.rand(args.batch_size, 1000, device="cuda").softmax(1)
    net = torch.compile(model) if args.compile else model

    def step() -> None:
        with torch.autocast("cuda", torch.bfloat16, enabled=not args.no_amp, cache_enabled=False):
            logits = net(images)
        F.cross_entropy(logits.float(), targets).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
        ema.update(model)

    return step


def inference_step(args: argparse.Namespace) -> Callable[[], object]:
    model = create_model(args.model, img_size=args.input_size, scan_backend=args.backend).cuda().eval()
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device="cuda")
    net = torch.compile(model) if args.compile else model

    @torch.no_grad()
    def step() -> torch.Tensor:
        with torch.autocast("cuda", torch.bfloat16, enabled=not args.no_amp, cache_enabled=False):
            return net(images)

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--no_amp", action="store_true", help="fp32, without TF32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--no-graph", action="store_true", help="time eager launches only")
    parser.add_argument("--infer", action="store_true", help="inference instead of training")
    parser.add_argument("--repeats", type=int, default=30)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a GPU and there is none here")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    step = (inference_step if args.infer else training_step)(args)
    precision = "fp32" if args.no_amp else "bf16"
    what = f"{args.model} {args.input_size}, batch {args.batch_size}, {precision}, {args.backend}"
    table = Table("launched", "ms a step", "img/s", "peak GiB", title=f"{what}, {torch.cuda.get_device_name()}")
    for name, run in (("eagerly", lambda: step), ("as a graph", lambda: as_graph(step))):
        if name == "as a graph" and args.no_graph:
            continue
        torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(run(), args.repeats)
        peak = torch.cuda.max_memory_allocated() / 2**30
        table.add_row(name, f"{ms:.2f}", f"{1000 * args.batch_size / ms:,.0f}", f"{peak:.2f}")
    Console(width=110).print(table)


if __name__ == "__main__":
    run_main(main)
