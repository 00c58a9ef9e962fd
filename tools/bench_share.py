"""How much of its speed training keeps with the loader, against the same training on images already on the GPU.

    python tools/bench_share.py shards/
    python tools/bench_share.py shards/ small/ --decoders cpu cuda hardware --threads 8 14 --copies 1 3

Steps are the trainer's own: mixing, forward, backward, fused AdamW, weight average, as a CUDA graph. Before and after
every few rows comes one without a loader, and a share is of the last of these: machines drift. "waiting" is the part of
the time that the host spends in the loader, which costs nothing while the GPU has steps in its queue.
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterator

import torch
from comparison import cross_entropy
from torch import Tensor

from vimfast.cli import run_main
from vimfast.config import AugmentConfig, EmaConfig, MixConfig, OptimConfig
from vimfast.data.hardware import DECODERS
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.order import Order
from vimfast.data.source import open_source
from vimfast.data.views import training_view
from vimfast.errors import UserError
from vimfast.models import create_model
from vimfast.speed import endless
from vimfast.train.mixing import Mixup
from vimfast.train.optim import build_ema, build_optimizer
from vimfast.train.step import TrainStep

CLASSES = 1000
WARM_UP_STEPS, STEPS_AT_ONCE = 12, 10
ROWS_BETWEEN = 4  # with a loader, between two without


def main() -> None:
    args = parse()
    device = torch.device(args.device)
    sources = {data: open_source(data, "train") for data in args.data}
    for data, source in sources.items():
        if len(source) < args.batch_size:
            raise UserError(f"{data} has {len(source)} images and --batch-size is {args.batch_size}; lower it")
    step = build(args, device)
    mix = Mixup(MixConfig(), CLASSES, 0, 0)
    columns = f"{'source':28} {'decoder':9} {'threads':>7} {'ahead':>5} {'copies':>6}"
    print(f"{columns} {'img/s':>8} {'share':>7} {'waiting':>8}")
    rows = list(itertools.product(args.data, args.decoders, args.threads, args.prefetch, args.copies))
    plain = 0.0
    for i, (data, decoder, threads, prefetch, copies) in enumerate(rows):
        if i % ROWS_BETWEEN == 0:
            plain = show_plain(step, mix, args, device)
        order = Order(len(sources[data]), args.batch_size, repeats=copies, shuffle=True, drop_last=True)
        view = training_view(order, device, AugmentConfig(), size=args.input_size)
        loader = Loader(sources[data], view, LoaderSettings(decoder, threads, prefetch))
        rate, waiting = measure(step, mix, endless(loader), args)
        chosen = loader.settings
        print(
            f"{data[-28:]:28} {chosen.decoder:9} {chosen.threads:7} {prefetch:5} {copies:6} {rate:8,.0f} "
            f"{rate / plain:7.1%} {waiting:8.0%}",
            flush=True,
        )
        loader.close()
    show_plain(step, mix, args, device)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+", help="shards folders, or folder trees with train/")
    parser.add_argument("--model", default="vim_tiny_patch16_224")
    parser.add_argument("--input-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--decoders", nargs="+", choices=DECODERS, default=["auto"])
    parser.add_argument("--threads", nargs="+", type=int, default=[None], help="default: as in training")
    parser.add_argument("--prefetch", nargs="+", type=int, default=[3], help="batches decoded ahead")
    parser.add_argument("--copies", nargs="+", type=int, default=[1], help="of each image, decoded once")
    parser.add_argument("--drop-path", type=float, default=0.0, help="stochastic depth, of which the trainer has 0.1")
    parser.add_argument("--seconds", type=float, default=3.0, help="to measure each row for")
    return parser.parse_args()


def build(args: argparse.Namespace, device: torch.device) -> TrainStep:
    """The trainer's step, captured where there is a GPU, which has to be before any loader works."""
    options = {"img_size": args.input_size, "num_classes": CLASSES, "drop_path_rate": args.drop_path}
    model = create_model(args.model, **options).to(device).train()
    amp = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda", cache_enabled=False)
    step = TrainStep(
        model,
        build_optimizer(OptimConfig(), model, 5e-4),
        cross_entropy,
        amp=amp,
        average=build_ema(EmaConfig(), model),
    )
    if device.type == "cuda":
        images, targets = torch.zeros(args.batch_size, 3, args.input_size, args.input_size), torch.zeros(1, CLASSES)
        step.capture(images.to(device), targets.repeat(args.batch_size, 1).to(device))
    return step


def show_plain(step: TrainStep, mix: Mixup, args: argparse.Namespace, device: torch.device) -> float:
    """The rate without a loader, images per second."""
    images = torch.randn(args.batch_size, 3, args.input_size, args.input_size, device=device)
    labels = torch.arange(args.batch_size, device=device) % CLASSES
    rate, _ = measure(step, mix, itertools.repeat((images, labels)), args)
    print(f"{'(images in memory)':60} {rate:8,.0f}", flush=True)
    return rate


def measure(
    step: TrainStep, mix: Mixup, batches: Iterator[tuple[Tensor, Tensor]], args: argparse.Namespace
) -> tuple[float, float]:
    """Images per second, and the part of the time that the host spent asking for batches."""

    def run(steps: int) -> float:
        waited = 0.0
        for i in range(steps):
            begin = time.perf_counter()
            images, labels = next(batches)
            waited += time.perf_counter() - begin
            step(*mix(images, labels, i))
        return waited

    def finish() -> None:
        if args.device != "cpu":
            torch.cuda.synchronize()

    run(WARM_UP_STEPS)
    finish()
    begin, steps, waited = time.perf_counter(), 0, 0.0
    while time.perf_counter() - begin < args.seconds:
        waited += run(STEPS_AT_ONCE)
        steps += STEPS_AT_ONCE
    finish()
    wall = time.perf_counter() - begin
    return steps * args.batch_size / wall, waited / wall


if __name__ == "__main__":
    run_main(main)
