"""How well the trainer feeds one or more GPUs: its images/s against those of as many GPUs on resident images.

    python tools/bench_gpus.py imagenet_data/ --preset node --json bench_gpus.json
    python tools/bench_gpus.py shards/ --row gpus=4,cores=32 --row gpus=4,cores=32,aug=none,batch=512
    python tools/bench_gpus.py --plot bench_gpus.json      # plot earlier results, as a PNG next to the file

Each row is a separate run of vimfast.train under torchrun: --steps steps of one epoch, on the first `cores` of the
machine's cores. Its figures are the trainer's own: the median of its reports after the warm-up. The share is relative
to gpus x the images/s of the same training step on images that already are on one GPU, measured in a separate process
before the first row and again after the last; the mean of the two counts. "cores used", "host GiB" and "GPU GiB" are
those of the whole run (GPU: the fullest one). "first step" is the time from the command to the trainer's line that its
first step is done; "exit" is from the last line to the end of torchrun.

What the rows read is read once before them, if memory holds it: vimfast-prepare leaves its shards on the disk, not in
memory, and the first row would measure that disk. --cold leaves this out.

Without a GPU the rows run on CPU processes (--device cpu), which shows whether it works but says nothing about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from watch import Line, Usage, Watched

from vimfast.cli import Parser, run_main, whole
from vimfast.config import MixConfig, ModelConfig
from vimfast.data.hardware import DECODERS
from vimfast.data.source import open_source
from vimfast.errors import UserError, did_you_mean
from vimfast.files import write_text
from vimfast.limits import memory
from vimfast.shards.format import is_shards_folder, read_manifest
from vimfast.shards.tree import scan_split

ROOT = Path(__file__).parent.parent
TORCHRUN = ("-m", "torch.distributed.run")
AUGMENTATIONS = {"default": (), "one-rank": ("--repeated-aug-on", "one-rank"), "none": ("--no-repeated-aug",)}
REPORT = re.compile(
    r"epoch 0 \[(?P<step>\d+)/\d+\].* (?P<img_s>[\d,]+) img/s, waiting for data (?P<waiting>\d+)%"
    r", (?P<gib>[\d.]+) GiB of"
)
FIRST_STEP = re.compile(r"^first step [\d.]+ s after")
DECODING = re.compile(r"decoder (?P<decoder>\w+), threads (?P<threads>\d+)")
RESIDENT = re.compile(r"resident: ([\d.]+) images/s")
LEAST_REPORTS = 2  # after the warm-up
READERS = 16  # threads
FILLED = 0.8  # of the available memory, by files
EXIT_LIMIT = 5.0  # seconds; a process still alive then counts as left over
LEAST = {"gpus": 1, "cores": 0, "batch": 1}  # values of a row
BARS = (95, 90)  # percent, plotted as lines


@dataclass(frozen=True)
class Row:
    """The settings of --row."""

    gpus: int = 1
    cores: int = 0  # 0: all
    batch: int = 128  # on each GPU
    decoder: str = "auto"
    aug: str = "default"  # where the copies of repeated augmentation go
    model: str = "vim_tiny_patch16_224"

    def __str__(self) -> str:
        parts = [f"{self.gpus} GPU{'s' * (self.gpus > 1)}", f"{self.cores} core{'s' * (self.cores > 1)}"]
        parts += [f"batch {self.batch}"]
        parts += [f"decoder {self.decoder}"] if self.decoder != "auto" else []
        parts += {"none": ["no repeated augmentation"], "one-rank": ["copies on one rank"]}.get(self.aug, [])
        return ", ".join([self.model.removesuffix("_patch16_224"), *parts])


@dataclass(frozen=True)
class Machine:
    gpu: str
    gpus: int
    cores: int
    cpu: str
    memory_gib: float


def main() -> int:
    args = parse()
    if args.resident:
        measure_resident(args)
        return 0
    if args.plot:
        plot(args.plot)
        return 0
    machine = this_machine(args.device)
    if args.data is None:
        raise UserError("no data given; add the folder of shards, or of train/ and val/")
    if args.json is not None and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: there is no such folder; make it first")
    rows = choose_rows(args, machine)
    record: dict[str, Any] = {
        "machine": asdict(machine),
        "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
        "command": shlex.join(["python", "tools/bench_gpus.py", *sys.argv[1:]]),
        "resident": [],
        "rows": [],
    }
    with grown(args.data, args.repeat) as data:
        images = len(open_source(data, "train"))
        if not args.cold:
            record["read"] = read_once(Path(data))
            report(record["read"])
        for row in rows:
            if too_few(row, images, args) or baseline(record, row) is not None:
                continue
            record["resident"].append({"model": row.model, "batch": row.batch, "before": resident(row, args)})
            report(f"{row.model}, batch {row.batch}: {rate_text(record['resident'][-1]['before'])} on resident images")
        for row in rows:
            record["rows"].append({**asdict(row), **measure(row, data, images, args)})
            fill_in_shares(record)
            save(record, args.json)
            report(one_line(row, record["rows"][-1]))
    for kind in record["resident"]:
        kind["after"] = resident(Row(model=kind["model"], batch=kind["batch"]), args)
    fill_in_shares(record)
    save(record, args.json)
    show(record)
    return int(all("failed" in found for found in record["rows"]))


def parse() -> argparse.Namespace:
    parser = Parser("tools/bench_gpus.py", __doc__ or "", formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", help="shards, or a folder tree with train/ and val/")
    words = "gpus=4,cores=64,batch=128,decoder=auto,aug=default|one-rank|none,model=vim_tiny_patch16_224"
    parser.add_argument("--row", dest="rows", action="append", metavar="WORDS", help=f"for example {words}; repeatable")
    parser.add_argument(
        "--preset", choices=("node",), help="node: one GPU, all GPUs on fewer and fewer cores, other recipes"
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--input-size", type=whole(1), default=224)
    parser.add_argument("--steps", type=whole(1), default=400, help="steps of each row [400]")
    parser.add_argument("--log-every", type=whole(1), default=50, help="steps between reports [50, as in training]")
    parser.add_argument("--warm-up", type=whole(0), default=3, help="reports to ignore at the start [3]")
    parser.add_argument("--seconds", type=float, default=3.0, help="how long to measure resident images [3]")
    parser.add_argument("--timeout", type=float, default=300.0, help="seconds after which a run is stopped [300]")
    parser.add_argument(
        "--repeat", type=whole(1), default=1, help="use each image of a folder this many times, through links [1]"
    )
    parser.add_argument("--cold", action="store_true", help="do not read the data into memory first")
    parser.add_argument("--json", type=Path, help="write the results here, after each row")
    parser.add_argument("--plot", type=Path, metavar="JSON", help="only plot the rows of this file, as a PNG")
    parser.add_argument("--resident", nargs=2, metavar=("MODEL", "BATCH"), help=argparse.SUPPRESS)
    parsed: argparse.Namespace = parser.parse_args(sys.argv[1:])
    return parsed


# What to run


def choose_rows(args: argparse.Namespace, machine: Machine) -> list[Row]:
    rows = [read_row(words) for words in args.rows or []]
    if args.preset:
        everything = Row(machine.gpus, machine.cores)
        rows += [
            Row(1, min(16, machine.cores)),
            everything,
            *(Row(machine.gpus, max(1, machine.cores // part)) for part in (2, 4)),
            Row(machine.gpus, machine.cores, aug="none"),
            Row(machine.gpus, machine.cores, batch=512),
            Row(machine.gpus, machine.cores, model="vim_small_patch16_224"),
        ]
    rows = [Row(**{**asdict(row), "cores": row.cores or machine.cores}) for row in rows]
    if not rows:
        raise UserError("no rows given; add --preset node, or --row gpus=1")
    for row in rows:
        if row.cores > machine.cores or (args.device == "cuda" and row.gpus > machine.gpus):
            gpus = f"{machine.gpus} GPUs and " if args.device == "cuda" else ""
            raise UserError(f"{row}: this machine has {gpus}{machine.cores} cores; request fewer")
    return list(dict.fromkeys(rows))


def read_row(words: str) -> Row:
    defaults = asdict(Row())
    given: dict[str, Any] = {}
    for word in words.split(","):
        name, _, value = word.partition("=")
        if name not in defaults:
            settings = ", ".join(defaults)
            raise UserError(f"--row has no setting {name!r}{did_you_mean(name, defaults)}; it has {settings}")
        try:
            given[name] = type(defaults[name])(value)
        except ValueError:
            raise UserError(f"--row: {name} is {value!r}; it must be an integer") from None
        if name in LEAST and given[name] < LEAST[name]:
            raise UserError(f"--row: {name} is {value}; it must be {LEAST[name]} or more")
    for name, known in (("aug", AUGMENTATIONS), ("decoder", DECODERS)):
        if given.get(name, defaults[name]) not in known:
            raise UserError(f"--row: {name} is {given[name]!r}; it must be one of {', '.join(known)}")
    return Row(**given)


@contextlib.contextmanager
def grown(data: str, times: int) -> Iterator[str]:
    """A temporary folder tree with `times` links to each training image; if that is 1, the data itself."""
    if times == 1:
        yield data
        return
    root = Path(data).absolute()
    files = scan_split(root, "train")
    with tempfile.TemporaryDirectory() as folder:
        for i in range(len(files)):
            link, target = Path(folder, "train", files.name(i)), files.path(i)
            link.parent.mkdir(parents=True, exist_ok=True)
            for copy in range(times):
                os.symlink(target, link.with_name(f"{link.stem}_{copy}{link.suffix}"))
        os.symlink(root / "val", Path(folder, "val"))
        yield folder


def read_once(folder: Path) -> str:
    """Read the training files, so that they are in memory if they fit in it; says how fast that was."""
    if is_shards_folder(folder):
        paths = [folder / shard.name for shard in read_manifest(folder).splits["train"].shards]
    else:
        files = scan_split(folder, "train")
        paths = list({files.path(i).resolve() for i in range(len(files))})
    size = sum(path.stat().st_size for path in paths)
    gib = f"{size / 2**30:.1f} GiB of training files"
    if size > FILLED * memory().available:
        return f"{gib} do not fit in free memory: every row reads them from the disk"

    def read(path: Path) -> None:
        with path.open("rb") as file, open(os.devnull, "wb") as nowhere:
            shutil.copyfileobj(file, nowhere, 1 << 20)

    begin = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(read, paths):
            pass
    return f"{gib} read into memory, at {size / 2**30 / (time.perf_counter() - begin):.2f} GiB/s"


def flags(row: Row, data: str, steps: int, args: argparse.Namespace) -> list[str]:
    return [
        *("--data-path", data, "--model", row.model, "--input-size", str(args.input_size), "--device", args.device),
        *("--batch-size", str(row.batch), "--decoder", row.decoder, *AUGMENTATIONS[row.aug]),
        *("--epochs", "1", "--warmup-epochs", "0", "--steps-per-epoch", str(steps), "--eval-steps", "1"),
        *("--log-every", str(args.log_every)),
    ]


# Measuring


def environment(args: argparse.Namespace) -> dict[str, str]:
    """This checkout's modules come first in children too; processes without a GPU use one thread each."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), **({"OMP_NUM_THREADS": "1"} if args.device == "cpu" else {})}


def too_few(row: Row, images: int, args: argparse.Namespace) -> str:
    """Why an epoch of this many images cannot be measured; empty if it can."""
    steps, least = images // (row.gpus * row.batch), args.log_every * (args.warm_up + LEAST_REPORTS)
    if min(steps, args.steps) >= least:
        return ""
    if args.steps < least:
        return f"--steps {args.steps} is too low for --log-every {args.log_every} and --warm-up {args.warm_up}"
    plural = "s" * (steps != 1)
    return f"{images:,} images make {steps} step{plural}, but {least} are needed; use more images, or --repeat"


def measure(row: Row, data: str, images: int, args: argparse.Namespace) -> dict[str, Any]:
    """The results of one row, or ``failed`` and the reason."""
    if problem := too_few(row, images, args):
        return {"failed": problem}
    steps = min(args.steps, images // (row.gpus * row.batch))
    torchrun = [sys.executable, *TORCHRUN, "--standalone", f"--nproc_per_node={row.gpus}"]
    cores = sorted(os.sched_getaffinity(0))[: row.cores]
    command = [*torchrun, "-m", "vimfast.train", *flags(row, data, steps, args)]
    usages: list[Usage] = []
    gpu_memory = None
    with Watched(command, env=environment(args), cores=cores) as run:
        while run.ended is None:
            if time.monotonic() - run.begin > args.timeout:
                return {"failed": f"still running after {args.timeout:.0f} s (--timeout): {last_words(run.lines)}"}
            time.sleep(0.25)
            count = sum(REPORT.search(line.text) is not None for line in list(run.lines))
            if count >= args.warm_up:
                usages.append(run.usage())
                gpu_memory = gpu_memory or max(query_gpus("memory.used")[: row.gpus], default=None)
        status = run.wait(args.timeout)
        left = run.gone_within(EXIT_LIMIT)
        if status:
            return {"failed": last_words(run.lines)}
        return {
            **read_reports(run, row, args),
            **read_usage(usages, run),
            "gpu_gib": None if gpu_memory is None else float(gpu_memory) / 1024,
            "exit_s": max(0.0, run.ended - run.lines[-1].at),  # a line may be read after the end
            "processes_left": len(left),
        }


def read_reports(run: Watched, row: Row, args: argparse.Namespace) -> dict[str, Any]:
    found = [(line.at, match) for line in run.lines if (match := REPORT.search(line.text))]
    kept = found[args.warm_up :]
    if len(kept) < LEAST_REPORTS:
        return {"failed": f"only {len(found)} reports; raise --steps or lower --log-every"}
    before = found[args.warm_up - 1 : -1] if args.warm_up else [(run.begin, None), *found[:-1]]
    seconds = [now - then for (now, _), (then, _) in zip(kept, before, strict=True)]
    per_step = statistics.median(seconds) / args.log_every
    chosen = next((match for line in run.lines if (match := DECODING.search(line.text))), None)
    return {
        "img_s": statistics.median(float(match["img_s"].replace(",", "")) for _, match in kept),
        "img_s_by_arrival": row.gpus * row.batch / per_step,
        "waiting": statistics.median(float(match["waiting"]) for _, match in kept) / 100,
        "torch_gib": float(kept[-1][1]["gib"]),
        "decoder_chosen": chosen and chosen["decoder"],
        "threads": chosen and int(chosen["threads"]),
        "first_step_s": next((line.at - run.begin for line in run.lines if FIRST_STEP.search(line.text)), None),
        "reports": len(kept),
    }


def read_usage(usages: list[Usage], run: Watched) -> dict[str, Any]:
    """Processor time and memory between the warm-up and the last report."""
    end = max((line.at for line in run.lines if REPORT.search(line.text)), default=0.0)
    inside = [usage for usage in usages if usage.at <= end]
    if len(inside) < 2:
        return {"cores_used": None, "host_gib": max((u.memory for u in usages), default=0.0) / 2**30 or None}
    first, last = inside[0], inside[-1]
    return {
        "cores_used": (last.cpu_seconds - first.cpu_seconds) / (last.at - first.at),
        "host_gib": max(usage.memory for usage in inside) / 2**30,
    }


def last_words(lines: list[Line]) -> str:
    """The line that says most about a failure: the last error that is not torchrun's, or else the last line."""
    texts = [line.text.strip() for line in list(lines) if re.search(r"\w", line.text)]
    errors = [t for t in texts if re.match(r"(\[rank\d+\]: )?(error: |[\w.]*Error\b)", t) and "ChildFailed" not in t]
    return ([*texts[-1:], *errors[-1:]] or ["no output"])[-1]


def resident(row: Row, args: argparse.Namespace) -> float | None:
    """Images/s of a training step without a loader, measured in a separate process; None if it failed."""
    size, seconds = str(args.input_size), str(args.seconds)
    own = [sys.executable, __file__, "--resident", row.model, str(row.batch), "--device", args.device]
    with Watched([*own, "--input-size", size, "--seconds", seconds], env=environment(args)) as run:
        try:
            status = run.wait(args.timeout)
        except TimeoutError:
            status = -1
        found = RESIDENT.search(run.out)
        if status or not found:
            report(f"resident images could not be measured: {last_words(run.lines)}")
            return None
        return float(found[1])


def measure_resident(args: argparse.Namespace) -> None:
    import bench_share

    from vimfast.train.mixing import Mixup
    from vimfast_kernels.tune import tune_once
    from vimfast_kernels.tuning import read_again

    args.model, args.batch_size = args.resident[0], int(args.resident[1])
    args.drop_path = ModelConfig().drop_path
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, False  # as the trainer sets them
        tune_once(0, report)  # so that no row has to
        read_again()
    mixup = Mixup(MixConfig(), bench_share.CLASSES, 0, 0)
    rate = bench_share.show_plain(bench_share.build(args, device), mixup, args, device)
    print(f"resident: {rate:.1f} images/s")


# Reporting


def baseline(record: dict[str, Any], row: Row) -> dict[str, Any] | None:
    """The measurement of resident images that belongs to a row."""
    entries = (e for e in record["resident"] if (e["model"], e["batch"]) == (row.model, row.batch))
    return next(entries, None)


def as_row(found: dict[str, Any]) -> Row:
    return Row(**{f.name: found[f.name] for f in fields(Row)})


def fill_in_shares(record: dict[str, Any]) -> None:
    """Relative to the mean of the measurements before the rows and, once it exists, after them."""
    for found in record["rows"]:
        entry = baseline(record, as_row(found))
        if "img_s" in found and entry is not None:
            rates = [rate for rate in (entry["before"], entry.get("after")) if rate]
            found["share"] = found["img_s"] / (found["gpus"] * statistics.mean(rates)) if rates else None


def save(record: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        write_text(path, json.dumps(record, indent=1) + "\n")


def report(text: str) -> None:
    print(text, flush=True)


def rate_text(rate: float | None) -> str:
    return "not measured" if rate is None else f"{rate:,.0f} images/s"


def one_line(row: Row, found: dict[str, Any]) -> str:
    if "failed" in found:
        return f"{row}: failed: {found['failed']}"
    return f"{row}: {found['img_s']:,.0f} images/s, {form(found['share'], '.1%')}, waiting {found['waiting']:.0%}"


def form(value: Any, spec: str = "") -> str:
    return "-" if value is None else format(value, spec)


COLUMNS = (
    ("img/s", "img_s", ",.0f"), ("share", "share", ".1%"), ("waiting", "waiting", ".0%"),
    ("decoder", "decoder_chosen", ""), ("threads", "threads", ""), ("cores used", "cores_used", ".1f"),
    ("host GiB", "host_gib", ".1f"), ("GPU GiB", "gpu_gib", ".1f"), ("first step, s", "first_step_s", ".1f"),
    ("exit, s", "exit_s", ".1f"),
)  # fmt: skip


def show(record: dict[str, Any]) -> None:
    machine = record["machine"]
    title = f"{machine['gpus']} x {machine['gpu']}, {machine['cores']} cores, torch {record['torch']}, {record['date']}"
    table = Table("row", title=title)
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="right")
    for found in record["rows"]:
        row = str(as_row(found))
        if "failed" in found:
            table.add_row(f"{row}\nfailed: {found['failed']}")
        else:
            table.add_row(row, *(form(found.get(key), spec) for _, key, spec in COLUMNS))
    Console(width=170, soft_wrap=False).print(table)
    for kind in record["resident"]:
        before, after = rate_text(kind["before"]), rate_text(kind["after"])
        report(f"one GPU on resident images, {kind['model']}, batch {kind['batch']}: {before} before, {after} after")


def plot(source: Path) -> None:
    """A bar chart of the rows' shares, as a PNG next to the JSON."""
    try:
        record = json.loads(source.read_text())
        machine, rows = record["machine"], record["rows"][::-1]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"--plot {source} holds no results of --json ({type(error).__name__}: {error})") from None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(10, 0.5 * len(rows) + 1.8), layout="constrained")
    shares = [100 * (row.get("share") or 0.0) for row in rows]
    axes.barh(range(len(rows)), shares, 0.62, color="#2a7f62", label="trainer, from files")
    for i, (row, share) in enumerate(zip(rows, shares, strict=True)):
        text = f"{share:.1f} %, {row['img_s']:,.0f} images/s" if share else f"failed: {row.get('failed', 'no share')}"
        inside = share > 40  # at the left end, clear of the lines
        axes.text(1 if inside else share + 1, i, text if len(text) < 80 else f"{text[:77]}...", va="center", fontsize=9,
                  color="white" if inside else "black")  # fmt: skip
    for bar, style in zip(BARS, ("--", ":"), strict=True):
        axes.axvline(bar, color="#c0504d", linestyle=style, linewidth=1.2, label=f"{bar} %")
    axes.set_yticks(range(len(rows)), [str(as_row(row)) for row in rows], fontsize=9)
    axes.set_xlim(0, max(105.0, *(share + 5 for share in shares)))
    axes.set_xlabel("images/s of the trainer, as % of GPUs x images/s of one GPU on resident images")
    axes.set_title(f"{machine['gpus']} x {machine['gpu']}, {machine['cores']} cores, {record['date']}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    figure.savefig(source.with_suffix(".png"), dpi=130)


# The machine


def query_gpus(what: str) -> list[Any]:
    """What nvidia-smi reports for each GPU, as numbers where possible; empty if there is no nvidia-smi."""
    command = ["nvidia-smi", f"--query-gpu={what}", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [float(value) if re.fullmatch(r"[\d.]+", value) else value for value in output.splitlines()]


def this_machine(device: str) -> Machine:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0))
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    cpu = found[1] if found else platform.machine()
    if device == "cpu":
        return Machine("process without a GPU", cores, cores, cpu, memory)
    if not torch.cuda.is_available():
        raise UserError("--device is cuda but no GPU is visible; use --device cpu to try the tool")
    return Machine(torch.cuda.get_device_name(0), torch.cuda.device_count(), cores, cpu, memory)


if __name__ == "__main__":
    for each in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(each, lambda number, frame: sys.exit(128 + number))  # by way of Watched, which ends its command
    run_main(main)
