"""``vimfast bench``: how fast this machine trains, infers and loads.

    vimfast bench shards/ --model vim_tiny_patch16_224

Beside the model stands timm's DeiT of its size, which is what a transformer does on the same machine: compiled on a
GPU, as it comes on a CPU, where compiling needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vimfast.cli import (
    SIZE,
    LiveLine,
    Parser,
    image_size,
    path_or_url,
    png,
    refuse_unwritable,
    say_written,
    whole,
    writing,
)
from vimfast.errors import UserError, counted, lacks_memory
from vimfast.image_size import ImageSize

if TYPE_CHECKING:
    import torch

    from vimfast.dist import World
    from vimfast.speed import Subject

_DEIT = {"deit_tiny_patch16_224": 5.7e6, "deit_small_patch16_224": 22.1e6, "deit_base_patch16_224": 86.6e6}
_NOISY = 0.1  # spread beyond which figures are called uncertain
_LONGEST = 32  # characters of a name in the plot
_GREEN, _GREY, _BLUE = "#2a7f62", "#8a8f98", "#4c6fa5"


@dataclass(frozen=True)
class Figure:
    """One line of the table."""

    what: str  # training, inference or loading
    of: str
    note: str
    img_s: float
    ms: float | None = None  # of a step
    gib: float | None = None  # of the GPU
    cores: float | None = None  # in use
    spread: float | None = None  # between the fastest of five stretches and the slowest, as a share of `ms`


def parser() -> Parser:
    """Of the command line."""
    parser = Parser(
        "vimfast bench",
        "Measure training and inference of a model on synthetic images, beside timm's DeiT of its size (on a GPU "
        "compiled), and with DATA the loader by itself, with the augmentation of training.",
        epilog="example: vimfast bench shards/ --model vim_small_patch16_224 --plot speed.png",
    )
    add = parser.add_argument
    add("data", metavar="DATA", nargs="?", type=path_or_url, help="shards or a folder tree, to measure the loader")
    name = "vim_tiny_patch16_224"
    add("--model", metavar="NAME", default=name, help=f"a Vision Mamba or any timm model [{name}]")
    text = "side of the images, pixels, or height and width [224]"
    add("--input-size", metavar=SIZE, type=image_size, default=224, help=text)
    add("--batch-size", metavar="N", type=whole(1), help="images of a step [128; on a CPU 2]")
    add("--device", metavar="NAME", default="auto", help="auto, cuda, cuda:N or cpu [auto]")
    add("--fp32", action="store_true", help="compute in fp32; default: bf16 autocast on a GPU, fp32 on a CPU")
    add("--scan-backend", metavar="NAME", default="auto", help="kernels of a Vision Mamba, as in training [auto]")
    add("--no-deit", action="store_true", help="leave DeiT out; compiling it for a GPU takes a minute or more")
    add("--no-training", action="store_true", help="leave training out")
    add("--seconds", metavar="X", type=float, default=3.0, help="about how long each measurement takes [3]")
    add("--json", action="store_true", help="print a JSON object instead of a table")
    add("--plot", metavar="PNG", type=png, help="draw the images per second; needs matplotlib")
    return parser


def main() -> None:
    """Measure what the command line asks for."""
    args = parser().parse_args(sys.argv[1:])
    if not 0 < args.seconds < 3600:
        raise UserError(f"--seconds is {args.seconds:g}", "it must be above 0 and below 3600")
    if args.plot is not None:
        _check_plot(args.plot)
    with LiveLine() as live:
        live.say("importing torch")
        import torch

        from vimfast.data.source import open_source
        from vimfast.dist import processes

        if args.data is not None:
            open_source(args.data, "train")  # before minutes have gone by
        with processes(args.device, timeout=600) as world:
            _settle(args, world)
            figures = _measure(args, world, live)
            where = _describe(args, world)
    if args.json:
        print(
            json.dumps(
                {"machine": where, "torch": torch.__version__, "figures": [asdict(f) for f in figures]}, indent=1
            )
        )
    else:
        _print(figures, where, args)
    if args.plot is not None:
        _plot(figures, where, args.plot)
        say_written(args.plot, aside=args.json)


def _settle(args: argparse.Namespace, world: World) -> None:
    """Fill in what depends on the device."""
    import torch

    on_gpu = world.device.type == "cuda"
    args.batch_size = args.batch_size or (128 if on_gpu else 2)
    args.amp = on_gpu and not args.fp32 and torch.cuda.is_bf16_supported(including_emulation=False)
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False


def _measure(args: argparse.Namespace, world: World, live: LiveLine) -> list[Figure]:
    import torch

    from vimfast.models import create_model
    from vimfast.speed import Subject, inference, training

    backend = {} if args.scan_backend == "auto" else {"scan_backend": args.scan_backend}
    model = create_model(args.model, img_size=args.input_size, **backend)
    parameters = sum(p.numel() for p in model.parameters())
    on_gpu = world.device.type == "cuda"
    kernels: Any = getattr(model, "kernels", None)
    args.kernels = "" if on_gpu or kernels is None else kernels(torch.float32)
    del model, kernels
    names = [args.model]
    if not args.no_deit:
        names.append(min(_DEIT, key=lambda name: abs(_DEIT[name] - parameters)))
    size = ImageSize.of(args.input_size)
    subjects = [
        Subject(name, args.batch_size, size, args.amp, args.scan_backend, compiled=on_gpu and i > 0)
        for i, name in enumerate(names)
    ]
    found = []
    kinds = [("inference", inference)] if args.no_training else [("training", training), ("inference", inference)]
    for what, prepare in kinds:
        if on_gpu:  # one by one, since each is to have the memory to itself
            for subject in subjects:
                live.say(f"measuring {what} of {subject.model}")
                found.append(_on_gpu(what, prepare, subject, world.device, args.seconds))
        else:
            live.say(f"measuring {what} of {' and '.join(names)}")
            found += _on_cpu(what, prepare, subjects, world.device, args.seconds)
    if args.data is not None:
        live.say(f"measuring the loader of {args.data}")
        found.append(_loading(args, world))
    return found


def _on_cpu(
    what: str, prepare: Callable[..., Any], subjects: list[Subject], device: torch.device, seconds: float
) -> list[Figure]:
    """In turn, since other processes take now more and now less of the cores."""
    from vimfast.speed import timings
    from vimfast.speed.steps import repeats_for

    gc.collect()
    runs = [prepare(subject, device)[0] for subject in subjects]
    times = timings(runs, device, [repeats_for(run, device, seconds) for run in runs])
    return [
        Figure(what, subject.model, "", 1000 * subject.batch / timed.ms, timed.ms, spread=timed.spread)
        for subject, timed in zip(subjects, times, strict=True)
    ]


def _on_gpu(what: str, prepare: Callable[..., Any], subject: Subject, device: torch.device, seconds: float) -> Figure:
    import torch

    from vimfast.speed import peak_gib, timing
    from vimfast.speed.steps import repeats_for

    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        run, capture = prepare(subject, device)
        try:
            repeats = repeats_for(run, device, seconds)
        except Exception as error:
            if lacks_memory(error) or not subject.compiled:
                raise
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{subject.model} cannot be compiled here ({why})", "add --no-deit") from None
        capture()
        timed = timing(run, device, repeats)
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        raise UserError(
            f"{device} has too little memory for {what} of {subject.model} on {counted(subject.batch, 'image')}",
            f"give --batch-size {subject.batch // 2}" if subject.batch > 1 else "give a smaller --input-size",
        ) from None
    note = "compiled, CUDA graph" if subject.compiled else "CUDA graph"
    rate = 1000 * subject.batch / timed.ms
    return Figure(what, subject.model, note, rate, timed.ms, peak_gib(), spread=timed.spread)


def _loading(args: argparse.Namespace, world: World) -> Figure:
    import torch

    from vimfast.config import plan_batches, resolve
    from vimfast.data.source import open_source
    from vimfast.speed import endless, measure_batches
    from vimfast.train.loaders import open_training
    from vimfast.train.report import Reporter

    given = {"data_path": args.data, "input_size": args.input_size, "batch_size": args.batch_size}
    cfg = resolve(given)
    source = open_source(args.data, "train")
    loader = open_training(source, cfg, plan_batches(cfg, 1), world, Reporter(None, active=True))
    finish = torch.cuda.synchronize if world.device.type == "cuda" else None
    rate, cores = measure_batches((len(batch.labels) for batch in endless(loader)), args.seconds, finish)
    note = f"decoder {loader.settings.decoder}, threads {loader.settings.threads}"
    loader.close()
    return Figure("loading", args.data, note, rate, cores=cores)


def _describe(args: argparse.Namespace, world: World) -> str:
    import torch

    if world.device.type == "cuda":
        machine = torch.cuda.get_device_name(world.device)
    else:
        threads = torch.get_num_threads()
        machine = f"CPU, {counted(threads, 'thread')}"
    precision = "bf16" if args.amp else "fp32"
    images = f"{counted(args.batch_size, 'image')} of {ImageSize.of(args.input_size)} pixels"
    return f"{machine}; {images} a step, {precision}"


def _print(figures: list[Figure], where: str, args: argparse.Namespace) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("what")
    table.add_column("of", overflow="fold")
    for column in ("img/s", "ms a step", "spread", "GiB", "cores"):
        table.add_column(column, justify="right")
    before = ""
    for f in figures:
        if before and f.what != before:
            table.add_section()
        before = f.what
        numbers = [f"{f.img_s:,.0f}" if f.img_s >= 100 else f"{f.img_s:.1f}"]
        spread = "" if f.spread is None else f"{f.spread:.0%}"
        ms, gib, cores = ("" if n is None else f"{n:,.1f}" for n in (f.ms, f.gib, f.cores))
        numbers += [ms, spread, gib, cores]
        table.add_row(f.what, f"{f.of}{f.note and f' ({f.note})'}", *numbers)
    console = Console(highlight=False)
    console.print(where, soft_wrap=True, markup=False, style="bold")
    console.print(table)
    for line in _verdicts(figures, args):
        console.print(line, soft_wrap=True, markup=False)


def _verdicts(figures: list[Figure], args: argparse.Namespace) -> list[str]:
    """What the figures say about each other."""
    lines = []
    for what in ("training", "inference"):
        rates = [f.img_s for f in figures if f.what == what]
        if len(rates) == 2:
            compiled = any("compiled" in f.note for f in figures)
            lines.append(f"{what}: {rates[0] / rates[1]:.2f} times the rate of {'compiled ' * compiled}DeiT")
    widest = max((f.spread for f in figures if f.spread is not None), default=0.0)
    if widest > _NOISY:
        lines.append(
            f"five stretches of each were timed, and they differ by up to {widest:.0%}: the machine is busy or its "
            "clock changes, and the ratios are as uncertain; try again when it is quiet, or with --seconds 20"
        )
    if args.kernels:
        lines.append(f"kernels {args.kernels}")
    if args.kernels.startswith("reference") and args.scan_backend != "reference":
        lines.append("inference is several times faster on a CPU with llvmlite: pip install 'vimfast[cpu]'")
    loading = next((f for f in figures if f.what == "loading"), None)
    if loading is not None and figures[0].what == "training":
        ratio = loading.img_s / figures[0].img_s
        lines.append(f"the loader alone gives {ratio:.2f} times what {args.model} trains on; 1.2 and more keep it fed")
    return lines


def _check_plot(out: Path) -> None:
    try:
        import matplotlib
    except ModuleNotFoundError:
        raise UserError("--plot needs matplotlib, which is not installed", "pip install matplotlib") from None
    matplotlib.use("Agg")
    refuse_unwritable("--plot", out)


def _short(name: str) -> str:
    """The end of a long path."""
    return name if len(name) <= _LONGEST else f"...{name[3 - _LONGEST :]}"


def _plot(figures: list[Figure], where: str, out: Path) -> None:
    """Bars of images per second: a panel each for training, inference and loading, whose rates are worlds apart."""
    from io import BytesIO

    from matplotlib import pyplot as plt

    from vimfast.files import write_bytes

    groups = {what: [f for f in figures if f.what == what][::-1] for what in dict.fromkeys(f.what for f in figures)}
    counts = [len(rows) for rows in groups.values()]
    figure, panels = plt.subplots(
        len(groups),
        squeeze=False,
        figsize=(9, 0.8 + 0.45 * len(groups) + 0.55 * len(figures)),
        layout="constrained",
        height_ratios=counts,
    )
    for axes, (what, rows) in zip(panels[:, 0], groups.items(), strict=True):
        colours = [_BLUE if f.what == "loading" else _GREY if f.of in _DEIT else _GREEN for f in rows]
        bars = axes.barh(range(len(rows)), [f.img_s for f in rows], height=0.6, color=colours)
        axes.bar_label(bars, [f"{f.img_s:,.0f}" if f.img_s >= 100 else f"{f.img_s:.1f}" for f in rows], padding=4)
        axes.set_yticks(range(len(rows)), [f"{_short(f.of)}\n{f.note}".strip() for f in rows], fontsize=9)
        axes.set(xlim=(0, 1.12 * max(f.img_s for f in rows)), ylim=(-0.5, len(rows) - 0.5), xticks=[])
        axes.set_title(what, fontsize=10, loc="left", weight="bold")
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(left=False)
    scales = "; each group has a scale of its own" if len(groups) > 1 else ""
    figure.suptitle(f"Images per second{scales}\n{where}", x=0.01, ha="left", fontsize=11)
    image = BytesIO()
    figure.savefig(image, dpi=130)
    plt.close(figure)
    with writing("--plot", out):
        write_bytes(out, image.getvalue())
