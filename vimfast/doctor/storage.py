"""How fast the images come from where they lie: a few hundred of them, picked at random."""

from __future__ import annotations

import itertools
import os
import random
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from vimfast.data.files import FilesSource
from vimfast.data.source import BadImage, Source, open_source
from vimfast.doctor.isolation import Failed, isolated
from vimfast.doctor.lines import Line
from vimfast.errors import UserError, counted
from vimfast.shards.format import SPLITS, is_shards_folder, read_manifest
from vimfast.shards.tree import is_image_name

PART = "data"
SHARDS = "shards"
_IMAGES, _BATCH, _SECONDS = 512, 64, 4.0
_PER_CLASS = 8
_PATIENCE = 60.0  # seconds, after which a disk is taken for dead
# Vim-Tiny's on an H200 (docs/benchmarks.md): nothing that vimfast trains needs more. Of three copies, one is read.
_NEEDED, _COPIES = 5680, 3
_NEEDED_BY_CPU = 100  # a few times what a CPU trains
_MOSTLY = 0.5


class Speed(NamedTuple):
    """What was read, and how fast."""

    kind: str
    images: int
    bytes: int
    seconds: float
    asked: int | None  # bytes that did not come from memory; None: the system does not say
    bad: str  # a sentence about an image that could not be read; empty: there was none


def look_at_data(folder: Path, gpus: int) -> Line:
    """The folder's kind and speed, and what the speed is enough for."""
    try:
        found: Speed | UserError = isolated(partial(_measure, folder), _PATIENCE)
    except Failed as error:
        fix = "see whether its disk is there and answers: ls, df"
        return Line(PART, "speed", "red", f"{folder} cannot be read ({error})", fix)
    if isinstance(found, UserError):
        return Line(PART, "speed", "red", found.problem, found.fix or "vimfast check DATA says more")
    rate, megabytes = found.images / found.seconds, found.bytes / 1e6 / found.seconds
    kilobytes = found.bytes / found.images / 1e3
    text = f"{folder} ({found.kind}): {megabytes:,.0f} MB/s, {rate:,.0f} images/s of {kilobytes:,.0f} KB"
    if found.asked is not None and found.asked < _MOSTLY * found.bytes:
        text += " (most of it from memory: the disk may be slower)"
    text += f"; {_meaning(rate, gpus)}"
    figures = {**found._asdict(), "mb_s": megabytes, "images_s": rate}
    if found.bad:
        return Line(PART, "speed", "yellow", f"{text}; {found.bad}", "vimfast check DATA --decode lists all", figures)
    if rate < (gpus * _NEEDED / _COPIES if gpus else _NEEDED_BY_CPU):
        fix = "copy it to a local disk, or make it smaller: vimfast prepare DATA --out small/ --resize 256"
        if found.kind != SHARDS:
            fix = f"read fewer files: vimfast prepare DATA --out shards/; or {fix}"
        return Line(PART, "speed", "yellow", text, fix, figures)
    return Line(PART, "speed", "green", text, figures=figures)


def _meaning(rate: float, gpus: int) -> str:
    if not gpus:
        return "more than a CPU trains" if rate >= _NEEDED_BY_CPU else "less than a CPU trains"
    enough = rate * _COPIES / _NEEDED
    return f"feeds {enough:.1f} GPUs that train Vim-Tiny as fast as an H200; there {'are' if gpus > 1 else 'is'} {gpus}"


def _measure(folder: Path) -> Speed | UserError:
    """A sentence instead where the folder is none that can be trained on."""
    try:
        source, kind, ids = _few_images(folder)
        images = size = 0
        bad, before = "", _asked()
        begin = time.perf_counter()
        batches = np.array_split(ids, -(-len(ids) // _BATCH))
        for batch, following in itertools.zip_longest(batches, batches[1:], fillvalue=ids[:0]):
            source.will_need(following)  # as in training
            read = list(_read(source, batch))
            bad = bad or next((why for _, why in read if why), "")
            images += sum(not why for _, why in read)
            size += sum(count for count, _ in read)
            if time.perf_counter() - begin > _SECONDS:
                break
        seconds, after = time.perf_counter() - begin, _asked()
    except UserError as error:
        return error
    if not images:
        return UserError(
            f"{bad}; none of {counted(len(ids), 'image')} could be read", "vimfast check DATA --decode lists all"
        )
    return Speed(kind, images, size, seconds, None if before is None or after is None else after - before, bad)


def _few_images(folder: Path) -> tuple[Source, str, np.ndarray]:
    """Where to read, what it is, and the ids of images spread over all of it."""
    generator = random.Random()  # other images each time: those of the last time are in memory now
    if is_shards_folder(folder):
        splits = read_manifest(folder).splits
        source: Source = open_source(folder, next((split for split in SPLITS if split in splits), SPLITS[0]))
        ids = generator.sample(range(len(source)), min(_IMAGES, len(source)))
        return source, SHARDS, np.array(ids, np.int64)
    split = next((folder / split for split in SPLITS if (folder / split).is_dir()), None)
    if split is None:
        source = open_source(folder, SPLITS[0])  # which says what is wrong with it
        raise AssertionError(f"{folder} has no split and opens")
    paths = list(_few_files(split, generator))
    if not paths:
        raise UserError(f"{split} holds no images in class folders", "vimfast check DATA says more")
    return FilesSource(paths), "folder of images", np.arange(len(paths))


def _few_files(split: Path, generator: random.Random) -> Iterator[Path]:
    """Images of some classes. A list of all of them takes minutes on a disk that is slow."""
    try:
        with os.scandir(split) as entries:
            classes = [entry.path for entry in entries if entry.is_dir() and not entry.name.startswith(".")]
        each = max(_PER_CLASS, -(-_IMAGES // max(len(classes), 1)))
        left = _IMAGES
        for path in generator.sample(classes, len(classes)):
            names = [Path(inside, name) for inside, _, names in os.walk(path) for name in names if is_image_name(name)]
            picked = generator.sample(names, min(each, left, len(names)))
            left -= len(picked)
            yield from picked
            if not left:
                return
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read ({error.strerror})", "fix its permissions") from None


def _read(source: Source, ids: Sequence[int] | np.ndarray) -> Iterator[tuple[int, str]]:
    """The size of each image that was read; or a sentence where it is bad."""
    while len(ids):
        try:
            encoded = source.read(np.asarray(ids)).encoded
        except BadImage as bad:
            yield 0, bad.found
            ids = np.array([i for i in ids if i != bad.image], np.int64)
            continue
        yield from ((len(data), "") for data in encoded)
        return


def _asked() -> int | None:
    """Bytes that this process has had from disks, rather than from memory."""
    with suppress(OSError, ValueError, KeyError):
        lines = dict(line.split(":") for line in Path("/proc/self/io").read_text().splitlines())
        return int(lines["read_bytes"])
    return None
