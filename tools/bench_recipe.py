"""How soon recipes reach an accuracy, and how far they get in a given time; wall time, with start-up and evaluations.

    python tools/bench_recipe.py DATA --recipes tiny_imagenet mine.yaml --seeds 0 1 2 --out runs/ -- --no-amp
    python tools/bench_recipe.py DATA --recipes tiny_imagenet --target 27.4 --within 276 --json figures.json

Runs go one after the other, each as ``vimfast train`` starts it; what follows ``--`` is for all of them. Times are from
the command to the line that reports the evaluation. Trained and averaged weights are counted apart, for who takes the
better of the two chooses by the validation images. The run folders stay in ``--out``.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from watch import Watched

from vimfast.files import write_text

WEIGHTS = ("trained", "averaged")
_LONGEST = 7 * 24 * 3600.0  # seconds of a run
_SCORED = re.compile(r"^validation( of the averaged weights \(EMA\))?: top-1 ([\d.]+) %")


@dataclass(frozen=True)
class Evaluated:
    """An evaluation: seconds since the command, whose weights, and their top-1 in per cent."""

    seconds: float
    weights: str
    top1: float


@dataclass(frozen=True)
class Trained:
    """A run; `seconds` is its wall time."""

    recipe: str
    seed: int
    seconds: float
    evaluations: list[Evaluated]

    def reached(self, target: float, weights: str) -> float | None:
        """Seconds to the first evaluation with so much top-1; None: there was none."""
        return next((e.seconds for e in self.evaluations if e.weights == weights and e.top1 >= target), None)

    def within(self, seconds: float, weights: str) -> float | None:
        """Top-1 of the last evaluation by then; None: there was none."""
        return next((e.top1 for e in reversed(self.evaluations) if e.weights == weights and e.seconds <= seconds), None)


def train(data: str, recipe: str, seed: int, out: Path, flags: Sequence[str]) -> Trained:
    """Train to the end, showing what the run says.

    Raises:
        SystemExit: it failed.
    """
    folder = out / f"{Path(recipe).stem}-seed{seed}"
    own = ["--config", recipe, "--data-path", data, "--seed", str(seed), "--output_dir", str(folder)]
    command = [sys.executable, "-m", "vimfast", "train", *own, *flags]
    with Watched(command, on_line=lambda line: print(line.text, file=sys.stderr, flush=True)) as run:
        status = run.wait(_LONGEST)
    if status:
        sys.exit(f"{' '.join(command)} ended with status {status}")
    found = [(line.at - run.begin, _SCORED.search(line.text)) for line in run.lines]
    evaluations = [Evaluated(at, WEIGHTS[match[1] is not None], float(match[2])) for at, match in found if match]
    assert run.ended is not None
    return Trained(recipe, seed, run.ended - run.begin, evaluations)


def mean(values: Sequence[float | None], digits: int) -> str:
    """With the standard deviation; of how many, where some are missing."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    spread = f" ± {statistics.stdev(known):.{digits}f}" if len(known) > 1 else ""
    of = f" ({len(known)} of {len(values)})" if len(known) < len(values) else ""
    return f"{statistics.mean(known):.{digits}f}{spread}{of}"


def table(runs: Sequence[Trained], target: float, within: float) -> Table:
    """A row for each recipe and kind of weights, over its seeds."""
    columns = ("recipe", "weights", "seeds", f"s to {target:g} %", f"% after {within:g} s", "% at the end", "s in all")
    shown = Table(*columns)
    for recipe in dict.fromkeys(run.recipe for run in runs):
        own = [run for run in runs if run.recipe == recipe]
        for weights in WEIGHTS:
            if not any(e.weights == weights for run in own for e in run.evaluations):
                continue
            shown.add_row(
                recipe,
                weights,
                " ".join(str(run.seed) for run in own),
                mean([run.reached(target, weights) for run in own], 0),
                mean([run.within(within, weights) for run in own], 1),
                mean([run.within(float("inf"), weights) for run in own], 1),
                mean([run.seconds for run in own], 0),
            )
    return shown


def main() -> None:
    argv, flags = sys.argv[1:], []
    if "--" in argv:
        argv, flags = argv[: argv.index("--")], argv[argv.index("--") + 1 :]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="a tree, or shards")
    parser.add_argument("--recipes", nargs="+", default=["tiny_imagenet"], metavar="RECIPE")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="N")
    parser.add_argument("--target", type=float, default=27.4, help="top-1, %% [%(default)s]")
    parser.add_argument("--within", type=float, default=276.0, help="seconds [%(default)s]")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_recipe"), help="run folders [%(default)s]")
    parser.add_argument("--json", type=Path, help="write all evaluations here too")
    args = parser.parse_args(argv)
    runs = []
    for seed in args.seeds:  # so that what a machine's other load changes is spread over the recipes
        for recipe in args.recipes:
            runs.append(train(args.data, recipe, seed, args.out, flags))
            if args.json is not None:
                write_text(args.json, json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    console = Console(width=max(Console().width, 110))
    console.print(table(runs, args.target, args.within))
    console.print("mean ± standard deviation over seeds; seconds from the command, with start-up and evaluations")


if __name__ == "__main__":
    main()
