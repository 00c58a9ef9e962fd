"""Does a long run use no more at its end than at its beginning? Memory, open files, threads and shared memory, plotted.

    python tools/soak.py tree_or_shards/ --epochs 100 --out docs/lab/soak.png

Short epochs, each with checkpoints and evaluations: what a run of weeks does, in minutes. A small model is trained;
data loading, checkpoints, evaluation and reports are those of every run.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table
from watch import PROC, Watched

from vimfast import __version__
from vimfast.cli import Parser, path, run_main, whole
from vimfast.errors import UserError

MODEL = ("--model-kwargs", "patch_size=8", "stride=8", "depth=2", "embed_dim=32", "--input-size", "40")
STEP = re.compile(r"epoch (\d+) \[(\d+)/(\d+)\]")
EVERY = 1.0  # seconds between two samples


class Sample(NamedTuple):
    """What a run holds at a moment."""

    step: int
    memory: float  # resident, MB
    files: int  # open
    threads: int
    shared: float  # /dev/shm, MB


QUANTITIES = (("resident memory", "MB"), ("open files", ""), ("threads", ""), ("shared memory in /dev/shm", "MB"))


def main() -> int:
    args = parse()
    samples = watch(args)
    if len(samples) < 10:
        raise UserError(f"only {len(samples)} samples were taken", "raise --epochs")
    show(samples)
    if args.out is not None:
        plot(samples, args)
    return 0


def parse() -> argparse.Namespace:
    parser = Parser("tools/soak.py", __doc__ or "", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=path, help="shards, or a folder tree with train/ and val/")
    parser.add_argument("--epochs", type=whole(1), default=100, help="[100]")
    parser.add_argument("--steps", type=whole(1), default=30, help="of an epoch [30]")
    parser.add_argument("--batch-size", type=whole(1), default=4, help="[4]")
    parser.add_argument("--out", type=path, metavar="PNG", help="plot the samples")
    parsed: argparse.Namespace = parser.parse_args(sys.argv[1:])
    return parsed


def watch(args: argparse.Namespace) -> list[Sample]:
    """Samples of a run from its second epoch on, when everything has been done once."""
    samples: list[Sample] = []
    with tempfile.TemporaryDirectory() as folder:
        words = [
            *(
                "--data-path",
                str(args.data),
                *MODEL,
                "--batch-size",
                str(args.batch_size),
                "--epochs",
                str(args.epochs),
            ),
            *("--steps-per-epoch", str(args.steps), "--warmup-epochs", "0", "--log-every", "10", "--save-every", "10"),
            *("--output_dir", folder),
        ]
        with Watched([sys.executable, "-m", "vimfast.train", *words]) as run:
            seen = 0
            while run.ended is None:
                time.sleep(EVERY)
                lines = [line.text for line in run.lines[seen:]]
                seen += len(lines)
                places = [match for match in map(STEP.match, lines) if match]
                if places and int(places[-1][1]) > 0:
                    epoch, step, of = map(int, places[-1].groups())
                    with suppress(OSError, IndexError):  # it may end meanwhile
                        samples.append(look(run.process.pid, epoch * of + step))
            if run.wait(10):
                raise UserError(f"the run ended with status {run.process.returncode}", run.text[-500:])
    return samples


def look(pid: int, step: int) -> Sample:
    status = dict(line.split(":", 1) for line in (PROC / str(pid) / "status").read_text().splitlines())
    files = len(list((PROC / str(pid) / "fd").iterdir()))
    shared = sum(file.stat().st_size for file in Path("/dev/shm").iterdir() if file.is_file())
    return Sample(step, int(status["VmRSS"].split()[0]) / 1000, files, int(status["Threads"]), shared / 1e6)


def show(samples: list[Sample]) -> None:
    tenth = max(1, len(samples) // 10)
    table = Table("of a run", title=f"steps {samples[0].step} to {samples[-1].step}")
    for name in ("first tenth, most", "last tenth, most", "largest"):
        table.add_column(name, justify="right")
    for i, (name, unit) in enumerate(QUANTITIES, 1):
        values = [float(sample[i]) for sample in samples]
        cells = (max(values[:tenth]), max(values[-tenth:]), max(values))
        table.add_row(name, *(f"{value:,.0f} {unit}".rstrip() for value in cells))
    Console().print(table)


def plot(samples: list[Sample], args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(9, 5), sharex=True, layout="constrained")
    steps = [sample.step for sample in samples]
    for i, ((name, unit), axis) in enumerate(zip(QUANTITIES, axes.flat, strict=True), 1):
        values = [float(sample[i]) for sample in samples]
        axis.plot(steps, values, color="#2f6fab", linewidth=1.2)
        axis.set_title(name, fontsize=10, loc="left")
        axis.set_ylabel(unit or "number")
        axis.set_ylim(0, max(1.0, 1.25 * max(values)))
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[1]:
        axis.set_xlabel("training step")
    title = f"A run of {args.epochs} epochs of {args.steps} steps: three checkpoints and an evaluation each"
    figure.suptitle(f"{title} (vimfast {__version__})", fontsize=11)
    figure.savefig(args.out, dpi=120)
    print(args.out)


if __name__ == "__main__":
    run_main(main)
