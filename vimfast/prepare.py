"""vimfast-prepare: an ImageNet folder becomes shards that every loader reads fast.

    vimfast-prepare imagenet_data/ --out shards/

The same as ``python -m vimfast.prepare``. Run again after a crash it resumes; the manifest is written last.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta, timezone
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from vimfast import __version__
from vimfast.cli import Parser, end_with_parent, run_main, whole
from vimfast.data import index, shards
from vimfast.data.shards import STATE_FOLDER, Note, Options, Part, Plan, Record
from vimfast.data.tree import scan_split
from vimfast.errors import UserError
from vimfast.files import TEMPORARY, write_text

_PLAN = "plan.json"
_SECONDS_BETWEEN_LINES = 10.0


def _parse(words: list[str]) -> argparse.Namespace:
    parser = Parser(
        "vimfast-prepare",
        "Turn a folder in the ImageNet layout into WebDataset shards with an index for random access. "
        "Pictures are stored byte for byte unless --resize is given. If it is interrupted, run it again: it resumes.",
        epilog="example: vimfast-prepare imagenet_data/ --out shards/",
    )
    add = parser.add_argument
    add("root", metavar="IMAGENET_ROOT", type=Path, help="folder that holds train/ and val/ (or one of them)")
    add("--out", metavar="FOLDER", type=Path, required=True, help="folder to write the shards into")
    add("--resize", metavar="N", type=whole(1), help="shrink to a short side of N pixels, as JPEGs of --quality")
    add("--quality", metavar="Q", type=whole(1, 100), help="JPEG quality of resized pictures, 1 to 100 [90]")
    add("--seed", type=whole(0), default=0, help="of the training set's shuffle [0]")
    add("--workers", metavar="W", type=whole(1), default=len(os.sched_getaffinity(0)), help="processes [one a core]")
    add("--shard-samples", metavar="S", type=whole(1), default=4096, help="most pictures in a shard [4096]")
    add("--skip-bad", action="store_true", help="leave unreadable pictures out and record them in the manifest")
    add("--overwrite", action="store_true", help="delete the shards that lie in --out first")
    add("--version", action="version", version=f"vimfast {__version__}")
    args = parser.parse_args(words)
    if args.quality is not None and args.resize is None:
        parser.error("--quality needs --resize: without it pictures keep their bytes")
    return args


def run() -> int:
    """Convert as the command line says; returns the exit status."""
    args = _parse(sys.argv[1:])
    root, out = args.root, args.out
    quality = None if args.resize is None else args.quality or 90
    options = Options(args.seed, args.resize, quality, args.shard_samples)
    _check_out(root, out)
    plans = _make_plans(root, options)
    with _lock(out):
        if not args.overwrite and _known_plan(out, plans) and _is_finished(out, plans):
            print(f"{out} is complete already: {_summary(index.read_manifest(out))}")
            return 0
        _check_space(plans, out)
        if args.overwrite:
            _delete_shards(out)
        (out / index.MANIFEST).unlink(missing_ok=True)
        described = {plan.split: plan.describe() for plan in plans}
        _write_json(out / STATE_FOLDER / _PLAN, described)
        begin = time.monotonic()
        written = _write_shards(plans, out, args.workers, args.skip_bad)
        manifest = _finish(plans, out, described)
        rate = f"; {written / (time.monotonic() - begin):,.0f} pictures/s" if written else ""
        print(f"{out} is complete: {_summary(manifest)}{rate}")
    return 0


def _make_plans(root: Path, options: Options) -> list[Plan]:
    """One plan for each split that is there; the training set decides the classes."""
    plans: list[Plan] = []
    for split in [s for s in index.SPLITS if (root / s).is_dir()] or ["train"]:
        found = scan_split(root, split, plans[0].files.classes if plans else None)
        plans.append(Plan(split, found, options))
        _say(f"{root / split}: {len(found):,} pictures of {len(found.classes):,} classes")
    for split in index.SPLITS:
        if not (root / split).is_dir():
            _say(f"{root} has no {split}/: only {plans[0].split} is converted")
    return plans


def _check_out(root: Path, out: Path) -> None:
    """The out folder must not become part of what is read."""
    inside = [root.resolve(), *((root / split).resolve() for split in index.SPLITS)]
    target = out.resolve()
    if target == inside[0] or any(target == folder or folder in target.parents for folder in inside[1:]):
        raise UserError(f"--out {out} lies among the pictures of {root}", "give a folder of its own")
    if target.exists() and not target.is_dir():
        raise UserError(f"--out {out} is a file", "give a folder")


@contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keeps a second vimfast-prepare out of the folder; the system frees the lock however this process ends."""
    try:
        (out / STATE_FOLDER).mkdir(parents=True, exist_ok=True)
        file = open(out / STATE_FOLDER / "lock", "w")  # noqa: SIM115
    except OSError as error:
        raise UserError(f"--out {out} cannot be written to ({error.strerror})", "choose another folder") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"another vimfast-prepare is writing to {out}", "wait for it, or give another --out"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield


def _known_plan(out: Path, plans: list[Plan]) -> bool:
    """Whether `out` was begun with these plans; False where it holds no shards, an error where it holds others."""
    known = _read_json(out / STATE_FOLDER / _PLAN) or _read_json(out / index.MANIFEST).get("plan", {})
    if not known and not index.is_shards_folder(out):
        return False
    fix = "add --overwrite to delete them, or give another --out"
    ours = {plan.split: plan.describe() for plan in plans}
    if not known or not set(known) <= set(ours):
        splits = " and ".join(sorted(known)) or "unknown origin"
        raise UserError(f"{out} holds shards of {splits}, not of {' and '.join(ours)} as here", fix)
    for split, description in known.items():
        if description["fingerprint"] == ours[split]["fingerprint"]:
            continue
        old, new = _flags(description["options"]), _flags(ours[split]["options"])
        what = f"from other files in {split}/" if old == new else f"with {old}, not with {new}"
        raise UserError(f"{out} holds shards made {what}", fix)
    return True


def _flags(options: dict[str, Any]) -> str:
    """The command line's words for these options."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in options.items() if value is not None)


def _is_finished(out: Path, plans: list[Plan]) -> bool:
    """Whether the manifest is there, covers these splits, and all the files it names are there in full."""
    try:
        manifest = index.read_manifest(out)
        if set(manifest["splits"]) != {plan.split for plan in plans}:
            return False
        for split, described in manifest["splits"].items():
            index.read_index(out, split, described["samples"])
            for number, shard in enumerate(described["shards"]):
                if (out / shard["name"]).stat().st_size != shard["bytes"]:
                    return False
                (out / index.dali_index_name(split, number)).stat()
    except (UserError, OSError, KeyError, TypeError):
        return False
    return True


def _our_files(out: Path) -> list[Path]:
    """Everything in `out` that some vimfast-prepare wrote."""
    names = [f"{split}-[0-9]*.{kind}*" for split in index.SPLITS for kind in ("tar", "idx")]
    names += [f"{index.index_name(split)}*" for split in index.SPLITS] + [f"{index.MANIFEST}*"]
    return [path for name in names for path in out.glob(name)]


def _delete_shards(out: Path) -> None:
    (out / index.MANIFEST).unlink(missing_ok=True)  # first: a folder on its way out must not look complete
    for path in [*_our_files(out), *(out / STATE_FOLDER).glob("*.npz*"), out / STATE_FOLDER / _PLAN]:
        path.unlink(missing_ok=True)


def _check_space(plans: list[Plan], out: Path) -> None:
    needed = sum(shards.estimate_bytes(plan) for plan in plans)
    there = sum(path.stat().st_size for path in _our_files(out))
    free = shutil.disk_usage(out).free
    if needed > free + there:
        raise UserError(
            f"{out} needs about {_gigabytes(needed - there)} more, {_gigabytes(free)} are free",
            "free some, give an --out on another disk, or store less with --resize 256",
        )


class _Pace:
    """How far it is, how fast, and how long it will take. Shards that were there count as done, not as speed."""

    def __init__(self, total: int) -> None:
        self.total, self.found, self.begin = total, 0, time.monotonic()

    def tell(self, written: int) -> tuple[int, str, str]:
        """(pictures done, rate, time left)"""
        done = self.found + written
        rate = written / max(1e-6, time.monotonic() - self.begin)
        left = str(timedelta(seconds=round((self.total - done) / rate))) if written else "-:--:--"
        return done, f"{rate:,.0f} pictures/s", f"{left} left"


@contextmanager
def _progress(pace: _Pace) -> Iterator[Any]:
    """A function to call often with the number of pictures written: a bar on a terminal, else a line now and then."""
    console = Console(stderr=True)
    if not console.is_terminal:
        last = time.monotonic()

        def line(written: int) -> None:
            nonlocal last
            if time.monotonic() - last >= _SECONDS_BETWEEN_LINES:
                last = time.monotonic()
                done, rate, left = pace.tell(written)
                _say(f"{done:,} of {pace.total:,} pictures, {rate}, {left}")

        yield line
        return
    text = TextColumn("{task.fields[rate]}  {task.fields[left]}")
    with Progress(BarColumn(None), MofNCompleteColumn(), text, console=console, expand=True) as bar:
        task = bar.add_task("", total=pace.total, rate="", left="")

        def draw(written: int) -> None:
            done, rate, left = pace.tell(written)
            bar.update(task, completed=done, rate=rate, left=left)

        yield draw


class _Stopped(Exception):
    """Ends a worker's task when the run is over for another reason."""


class _Shared(NamedTuple):
    """What workers share with the run: pictures written, and whether to stop."""

    written: Synchronized[int]
    stop: Event


_shared: _Shared | None = None  # in a worker


def _start_worker(shared: _Shared) -> None:
    global _shared
    _shared = shared
    warnings.simplefilter("ignore")  # Pillow's, on odd metadata of pictures that decode
    threading.Thread(target=end_with_parent, daemon=True).start()


@contextmanager
def _interrupts_held() -> Iterator[None]:
    """Ctrl-C waits for the end of the block. It reaches a whole group of processes, and those started in the block
    never see it: the run tells its workers to stop."""
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def _work(part: Part, out: Path, skip_bad: bool) -> tuple[Record, bool]:
    assert _shared is not None
    written, stop = _shared

    def tick() -> None:
        with written.get_lock():
            written.value += 1
        if stop.is_set():
            raise _Stopped

    return shards.write_shard(part, out, skip_bad, tick)


def _write_shards(plans: list[Plan], out: Path, workers: int, skip_bad: bool) -> int:
    """Write all shards that are not there; returns the number of pictures written.

    Raises:
        UserError: unreadable pictures (all are listed first), or a worker cannot go on.
    """
    todo = ((plan, number) for plan in plans for number in range(plan.shards))
    pace = _Pace(sum(map(len, plans)))
    context = multiprocessing.get_context("spawn")  # a fork would copy the threads' locks of whoever calls
    shared = _Shared(context.Value("q", 0), context.Event())
    bad: list[tuple[Path, str]] = []
    running: dict[Future[tuple[Record, bool]], Plan] = {}
    workers = min(workers, sum(plan.shards for plan in plans))
    with ProcessPoolExecutor(workers, context, _start_worker, (shared,)) as pool, _progress(pace) as show:
        try:
            while True:
                # A few parts ahead of the workers and no more: parts are lists of names.
                with _interrupts_held():
                    while len(running) < 2 * workers and (following := next(todo, None)):
                        plan, number = following
                        running[pool.submit(_work, plan.part(number), out, skip_bad)] = plan
                if not running:
                    break
                for future in wait(running, timeout=0.2, return_when=FIRST_COMPLETED).done:
                    plan = running.pop(future)
                    record, found = future.result()
                    pace.found += record.samples + len(record.skipped) if found else 0
                    bad += [(plan.files.folder / note.file, note.why) for note in record.skipped]
                show(shared.written.value)
        except BrokenProcessPool:
            raise UserError(
                "a worker process was killed, perhaps for lack of memory",
                "run again with fewer --workers, it resumes",
            ) from None
        finally:
            shared.stop.set()
            pool.shutdown(cancel_futures=True)
    for path, why in bad:
        print(f"{path}: {why}", file=sys.stderr)
    if bad and not skip_bad:
        raise UserError(
            f"{len(bad)} of {pace.total} pictures cannot be read, listed above",
            "fix them, or leave them out with --skip-bad, and run again: it resumes",
        )
    return shared.written.value


def _finish(plans: list[Plan], out: Path, described: dict[str, Any]) -> dict[str, Any]:
    """Write the index of each split, then the manifest, from the records of the shards; returns the manifest."""
    splits = {}
    for plan in plans:
        records = [shards.read_record(out, plan.split, number) for number in range(plan.shards)]
        whole = [record for record in records if record]
        if len(whole) < plan.shards:
            raise UserError(f"{out / STATE_FOLDER} changed while it was used", "run again, it resumes")
        samples = sum(record.samples for record in whole)
        if not all(record.samples for record in whole):
            raise UserError(
                f"a whole shard of {plan.files.folder} is unreadable, {len(plan) - samples} of {len(plan)} pictures in "
                "all, and DALI reads no empty shard",
                "remove them, then convert with --overwrite",
            )
        splits[plan.split] = {
            "samples": samples,
            "bytes": sum(record.picture_bytes for record in whole),
            "shards": [
                {"name": index.shard_name(plan.split, k), "samples": record.samples, "bytes": record.tar_bytes}
                for k, record in enumerate(whole)
            ],
            "index_crc32": shards.write_index(plan, out, samples),
            "changed": _by_file(note for record in whole for note in record.changed),
            "skipped": _by_file(note for record in whole for note in record.skipped),
        }
    options = plans[0].options
    manifest = {
        "format": index.FORMAT,
        "version": index.VERSION,
        "vimfast": __version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "classes": plans[0].files.classes,
        "seed": options.seed,
        "resize": options.resize,
        "quality": options.quality,
        "splits": splits,
        "plan": described,
    }
    for path in [*_our_files(out), *(out / STATE_FOLDER).glob("*.npz*")]:
        if path.suffix == TEMPORARY:  # of a run that was killed
            path.unlink()
    _write_json(out / index.MANIFEST, manifest)
    return manifest


def _by_file(notes: Iterator[Note]) -> list[dict[str, str]]:
    return [note._asdict() for note in sorted(notes)]


def _summary(manifest: dict[str, Any]) -> str:
    """The manifest in a line."""
    parts = []
    for split, described in manifest["splits"].items():
        notes = "".join(f", {len(described[what])} {what}" for what in ("changed", "skipped") if described[what])
        parts.append(f"{described['samples']:,} {split} pictures in {len(described['shards'])} shard(s){notes}")
    stored = sum(shard["bytes"] for described in manifest["splits"].values() for shard in described["shards"])
    return f"{', '.join(parts)}, {_gigabytes(stored)}"


def _gigabytes(count: int) -> str:
    return f"{count / 1e9:,.1f} GB" if count >= 1e9 else f"{count / 1e6:,.1f} MB"


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty where the file is missing or damaged."""
    with suppress(OSError, ValueError):
        content = json.loads(path.read_text())
        if isinstance(content, dict):
            return content
    return {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1) + "\n")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> None:
    """The console script."""
    run_main(run)


if __name__ == "__main__":
    main()
