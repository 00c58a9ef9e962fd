"""Whole training and inference steps on synthetic images: images per second, memory, distance to the floor.

    python tools/bench_train.py                              # every row
    python tools/bench_train.py --rows tiny small --backends auto mamba_ssm
    python tools/bench_train.py --plot docs/bench_train.json # draw what an earlier run wrote

A training step is the trainer's own: forward, backward, fused AdamW and the weight average, captured as it captures
it. "launched" is the same without a CUDA graph. "host" is the share of a step in which the GPU waits for the host: the
time of steps as they come, against that of steps that were queued while the GPU was busy with something else.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from floors import Gpu, step, this_gpu
from rich.console import Console
from rich.table import Table

from vimfast.cli import run_main
from vimfast.errors import UserError
from vimfast.files import write_text
from vimfast.image_size import ImageSize
from vimfast.speed import Subject, inference, milliseconds, peak_gib, training
from vimfast.speed.steps import Run
from vimfast_kernels import backend_names


@dataclass(frozen=True)
class Row:
    """One measurement, and what the original does on an H200 (images per second; None: not measured)."""

    name: str
    model: str
    batch: int
    size: int = 224
    fp32: bool = False
    training: bool = True
    original: int | None = None  # hustvl/Vim dd0358a with mamba_ssm 2.3's CUDA kernels
    compiled: bool = False

    def __str__(self) -> str:
        what = "training" if self.training else "inference"
        what += ", compiled" * self.compiled
        return f"{self.model.removesuffix('_patch16_224')} {self.size}, {self.batch}, {what}, {self.precision}"

    @property
    def task(self) -> tuple[Any, ...]:
        """What steps of two models have to share to be compared."""
        return self.model.split("_")[1], self.size, self.batch, self.training, self.fp32

    @property
    def short(self) -> str:
        return f"{self.model.split('_')[1].capitalize()}, {self.size} pixels,\n{self.batch} images, {self.precision}"

    @property
    def precision(self) -> str:
        return "fp32" if self.fp32 else "bf16"


ROWS = (
    Row("tiny", "vim_tiny_patch16_224", 128, original=1075),
    Row("tiny512", "vim_tiny_patch16_224", 512, original=1147),
    Row("small", "vim_small_patch16_224", 128, original=586),
    Row("base", "vim_base_patch16_224", 128),
    Row("fp32", "vim_tiny_patch16_224", 128, fp32=True, original=911),
    Row("infer", "vim_tiny_patch16_224", 256, training=False, original=4547),
    Row("infer1248", "vim_tiny_patch16_224", 32, size=1248, training=False, original=214),
)
BASELINES = (
    Row("deit", "deit_tiny_patch16_224", 128),
    Row("deit_compiled", "deit_tiny_patch16_224", 128, compiled=True),
    Row("deit512_compiled", "deit_tiny_patch16_224", 512, compiled=True),
    Row("deit_small_compiled", "deit_small_patch16_224", 128, compiled=True),
    Row("deit_base_compiled", "deit_base_patch16_224", 128, compiled=True),
    Row("deit1248", "deit_tiny_patch16_224", 32, size=1248, training=False),
)
OURS, ORIGINAL = "Vim, vimfast", "Vim, hustvl/Vim with mamba_ssm"
COMPILED, PLAIN = "DeiT, timm, compiled", "DeiT, timm"
COLORS = {OURS: "#2a7f62", ORIGINAL: "#d08c60", COMPILED: "#5d6673", PLAIN: "#a9aeb7"}
WIDTHS = {"vim_tiny_patch16_224": 192, "vim_small_patch16_224": 384, "vim_base_patch16_224": 768}


def queued_milliseconds(run: Run, calls: int = 2) -> float:
    """Median time on the GPU of one of `calls` calls that were all launched before the first of them began."""
    times: list[float] = []
    for _ in range(7):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        torch.cuda._sleep(int(0.3e9))  # clock cycles: longer than the launches take
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end) / calls)
    return statistics.median(times)


def measure(row: Row, args: argparse.Namespace, backend: str, gpu: Gpu) -> dict[str, Any]:
    gc.collect()  # the row before may have left its model in a cycle
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    device = torch.device("cuda")
    subject = Subject(row.model, row.batch, ImageSize.of(row.size), not row.fp32, backend, row.compiled)
    run, capture = (training if row.training else inference)(subject, device)
    launched = milliseconds(run, device, args.repeats)
    found: dict[str, Any] = {**asdict(row), "backend": backend, "launched_ms": launched}
    found["launched_gib"] = peak_gib()
    capture()
    found["ms"] = milliseconds(run, device, args.repeats)
    found["gib"] = peak_gib()
    found["host_share"] = max(0.0, 1 - queued_milliseconds(run) / found["ms"])
    found["img_s"], found["launched_img_s"] = (1000 * row.batch / found[key] for key in ("ms", "launched_ms"))
    if row.model in WIDTHS:
        ops = step(row.batch, row.size, WIDTHS[row.model], fp32=row.fp32, training=row.training)
        found["floor_ms"] = 1000 * gpu.seconds(ops, row.fp32)
    return found


def show(found: list[dict[str, Any]], title: str) -> None:
    table = Table(title=title)
    for column in ("step", "backend", "ms", "img/s", "launched", "GiB", "host", "floor ms", "x floor", "original"):
        table.add_column(column, justify="left" if column in ("step", "backend") else "right")
    names = {row.name: str(row) for row in (*ROWS, *BASELINES)}
    for f in found:
        floor = f.get("floor_ms")
        table.add_row(
            names[f["name"]], f["backend"], f"{f['ms']:.2f}", f"{f['img_s']:,.0f}", f"{f['launched_img_s']:,.0f}",
            f"{f['gib']:.2f}", f"{f['host_share']:.1%}", f"{floor:.1f}" if floor else "",
            f"{f['ms'] / floor:.2f}" if floor else "", f"{f['original']:,}" if f["original"] else "",
        )  # fmt: skip
    Console(width=140).print(table)


def plot(source: Path) -> None:
    """Images per second as a PNG next to the JSON, beside those of the original and of a transformer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    record = json.loads(source.read_text())
    known = {row.name: row for row in (*ROWS, *BASELINES)}
    figures = [(known[f["name"]], f) for f in record["figures"] if f["backend"] in ("auto", "timm")]
    transformers: dict[tuple[Any, ...], tuple[Row, float]] = {}
    for row, found in figures:
        if row in BASELINES and (row.compiled or row.task not in transformers):
            transformers[row.task] = row, found["img_s"]
    steps = [(row, found) for row, found in figures if row in ROWS]
    heights = [sum(row.training is training for row, _ in steps) for training in (True, False)]
    figure, panels = plt.subplots(
        2, figsize=(9, 1.8 + 0.75 * sum(heights)), layout="constrained", height_ratios=heights
    )
    used: set[str] = set()
    for axes, trains in zip(panels, (True, False), strict=True):
        own = [(row, found) for row, found in steps if row.training is trains][::-1]
        bars: dict[str, list[tuple[float, float]]] = {label: [] for label in COLORS}
        for place, (row, found) in enumerate(own):
            bars[OURS].append((place + 0.27, found["img_s"]))
            if row.original:
                bars[ORIGINAL].append((place, row.original))
            if row.task in transformers:
                other, rate = transformers[row.task]
                bars[COMPILED if other.compiled else PLAIN].append((place - (0.27 if row.original else 0), rate))
        for label, color in COLORS.items():
            places, rates = zip(*bars[label], strict=True) if bars[label] else ((), ())
            drawn = axes.barh(places, rates, height=0.25, color=color)
            used |= {label} if rates else set()
            axes.bar_label(drawn, fmt="{:,.0f}", padding=3, fontsize=9)
        axes.set_yticks(range(len(own)), [row.short for row, _ in own])
        axes.set(xlim=(0, 1.12 * max(rate for found in bars.values() for _, rate in found)), xticks=[])
        axes.set_title("training" if trains else "inference", fontsize=10, loc="left", weight="bold")
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False)
    patches = [Patch(color=color, label=label) for label, color in COLORS.items() if label in used]
    figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    title = f"Images per second; each group has a scale of its own\n{record['gpu']}, {record['date']}"
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.savefig(source.with_suffix(".png"), dpi=130)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [row.name for row in (*ROWS, *BASELINES)]
    parser.add_argument("--rows", nargs="+", choices=known, default=known, metavar="ROW", help=" ".join(known))
    parser.add_argument("--backends", nargs="+", default=["auto"], choices=backend_names(), help="kernels to time")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only draw the figures of this file, as a PNG")
    args = parser.parse_args()
    if args.plot:
        plot(args.plot)
        return
    if not torch.cuda.is_available():
        raise UserError("this benchmark needs a GPU and there is none here")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.benchmark = True
    gpu = this_gpu()
    chosen = [(row, backend) for row in ROWS if row.name in args.rows for backend in args.backends]
    chosen += [(row, "timm") for row in BASELINES if row.name in args.rows]
    found: list[dict[str, Any]] = []
    record = {"gpu": gpu.name, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"), "figures": found}
    try:
        for row, backend in chosen:
            print(f"{row}, {backend}: ", end="", flush=True)
            found.append(measure(row, args, backend, gpu))
            print(f"{found[-1]['ms']:.2f} ms", flush=True)
            if args.json:
                write_text(args.json, json.dumps(record, indent=1) + "\n")
    finally:  # at Ctrl-C, or where a row does not fit in memory, what was measured before it
        show(found, f"{gpu.name}, torch {torch.__version__}, copies {gpu.copy / 1e12:.2f} TB/s")


if __name__ == "__main__":
    run_main(main)
