"""How fast vimfast-prepare is, beside ``tar cf`` of the same tree in the same run.

    python tools/bench_prepare.py imagenet_data/

The images are copied, repeated up to --files, into a temporary folder, which also takes the output (room for three
times the images is needed) and is deleted at the end. Each command runs --runs times, in turns, and the median
counts; every run begins with an empty write-back queue. The images come from the page cache.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent.parent))

from vimfast.cli import run_main
from vimfast.errors import UserError
from vimfast.shards.tree import scan_split

ROOT = Path(__file__).parent.parent


def repeat(root: Path, to: Path, wanted: int) -> int:
    """Copy the training set (else the validation set) of `root` until `to` holds `wanted` files; returns the bytes."""
    split = "train" if (root / "train").is_dir() else "val"
    files = scan_split(root, split)
    total = 0
    for number in range(wanted):
        source = files.path(number % len(files))
        copy = to / split / files.classes[files.labels[number % len(files)]] / f"{number:06d}_{source.name}"
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, copy)
        total += copy.stat().st_size
    return total


def measure(command: list[str]) -> float:
    """Seconds of one run."""
    os.sync()
    begin = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - begin
    if done.returncode:
        raise UserError(f"{shlex.join(command)} failed: {done.stderr.strip() or done.stdout.strip()}")
    return seconds


def run() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", metavar="IMAGENET_ROOT", type=Path, help="a folder with train/ or val/")
    parser.add_argument("--files", type=int, default=10_000, help="images to convert [10000]")
    parser.add_argument("--runs", type=int, default=3, help="runs of each command [3]")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)), help="[one a core]")
    parser.add_argument("--tmp", type=Path, default=None, help="where the temporary folder is made [the system's]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_prepare_", dir=args.tmp) as folder:
        tree, out = Path(folder, "tree"), Path(folder, "out")
        size = repeat(args.root, tree, args.files)
        prepare = [sys.executable, "-m", "vimfast.prepare", str(tree), "--out", str(out)]
        prepare += ["--workers", str(args.workers)]
        commands = [
            ["tar", "cf", str(out), "-C", str(tree), "."],
            prepare,
            [*prepare, "--resize", "256", "--quality", "90"],
        ]
        seconds: list[list[float]] = [[] for _ in commands]
        for _ in range(args.runs):
            for command, times in zip(commands, seconds, strict=True):
                times.append(measure(command))
                shutil.rmtree(out) if out.is_dir() else out.unlink()
    title = f"{args.files:,} images of {size / args.files / 1e3:.0f} KB, {args.workers} workers, median of {args.runs}"
    table = Table("command", "images/s", "MB/s read", "of tar", title=title)
    medians = [statistics.median(times) for times in seconds]
    for name, median in zip(("tar cf", "vimfast-prepare", "... --resize 256 --quality 90"), medians, strict=True):
        rate, share = args.files / median, medians[0] / median
        table.add_row(name, f"{rate:,.0f}", f"{size / median / 1e6:,.0f}", f"{share:.0%}")
    Console().print(table)


if __name__ == "__main__":
    run_main(run)
