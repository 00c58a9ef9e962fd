"""What a check finds, and the checks that folder trees and shards share: of an image, and of the classes."""

from __future__ import annotations

import importlib.util
import itertools
import multiprocessing
import re
import signal
import threading
import warnings
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from vimfast.cli import end_with_parent
from vimfast.errors import UserError, counted
from vimfast.shards import jpeg
from vimfast.shards.tree import EXTENSIONS

IMAGENET_CLASSES = 1000
IMAGENET_IMAGES = {"train": 1_281_167, "val": 50_000}
IMAGENET_PER_CLASS = {"train": (732, 1300), "val": (50, 50)}
WNID = re.compile(r"(?<![A-Za-z0-9])n\d{8}(?!\d)")

# Of images of other formats, only decoding shows whether they can be read.
_KNOWN_BY_HEADER = {"jpeg", "png", "webp", "bmp", "tiff", "ppm"}
_KEPT, _KEPT_IN_ALL = 2_000, 50_000  # findings in memory: of the same severity, split and fix, and of all
_FEW = 1000  # images that are checked before other processes have started

Severity = Literal["error", "warning"]


class Kind(NamedTuple):
    """What findings have in common that are shown together."""

    severity: Severity
    split: str
    fix: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong: an error makes the data unfit to train on, a warning does not.

    `split` is empty for what concerns the whole data set; `file` is a path, and ``<tar>: <member>`` for an image in a
    shard; `fix` is empty where `what` says it all.
    """

    severity: Severity
    split: str
    file: str
    what: str
    fix: str

    @property
    def kind(self) -> Kind:
        return Kind(self.severity, self.split, self.fix)

    @classmethod
    def of(cls, error: UserError, split: str, path: Path) -> Finding:
        """The finding for an error; our sentences begin with the path, or that of its folder."""
        what = error.problem
        file = next((f for f in (str(path), str(path.parent)) if what.startswith(f"{f} ")), str(path))
        return cls("error", split, file, what.removeprefix(f"{file} ").removeprefix("is "), error.fix or "")


class Findings(list[Finding]):
    """Findings, of which the first thousands of each kind are kept and the others counted: a data set on a disk that
    failed has a million.

    Attributes:
        errors, warnings: how many there were.
    """

    def __init__(self, findings: Iterable[Finding] = ()) -> None:
        super().__init__()
        self.errors = self.warnings = 0
        self._kinds: Counter[Kind] = Counter()
        self.extend(findings)

    def append(self, finding: Finding) -> None:
        kind = finding.kind
        self._kinds[kind] += 1
        self.errors += finding.severity == "error"
        self.warnings += finding.severity == "warning"
        if self._kinds[kind] <= _KEPT and len(self) < _KEPT_IN_ALL:
            super().append(finding)

    def extend(self, findings: Iterable[Finding]) -> None:
        for finding in findings:
            self.append(finding)

    def __iadd__(self, findings: Iterable[Finding]) -> Findings:  # type: ignore[override, misc]
        self.extend(findings)
        return self

    def of_kind(self, kind: Kind) -> int:
        """How many there were of this kind."""
        return self._kinds[kind]

    def by_kind(self) -> list[tuple[Kind, list[Finding]]]:
        """Those that were kept, of the same kind together, errors first."""
        groups: dict[Kind, list[Finding]] = {}
        for finding in self:
            groups.setdefault(finding.kind, []).append(finding)
        return sorted(groups.items(), key=lambda group: group[0].severity)

    @property
    def dropped(self) -> int:
        """Those that are counted only."""
        return self.total - len(self)

    @property
    def total(self) -> int:
        return self.errors + self.warnings


class SplitSummary(NamedTuple):
    """What a split holds; `least` and `most` are images per class, `bytes` is the size of all images."""

    split: str
    classes: int
    images: int
    least: int
    most: int
    bytes: int


@dataclass
class Report:
    """Everything found in a folder. `kind` is ``"nothing"`` if it is neither.

    Attributes:
        classes: split -> class name -> images.
        sizes: split -> int64 [n, 2]: height and width of the images whose headers say them, pixels.
    """

    path: str
    kind: Literal["folder tree", "shards", "nothing"]
    splits: list[SplitSummary] = field(default_factory=list)
    findings: Findings = field(default_factory=Findings)
    classes: dict[str, dict[str, int]] = field(default_factory=dict)
    sizes: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def fit(self) -> bool:
        return not self.findings.errors


@dataclass(frozen=True)
class CheckOptions:
    """What to check: `classes` is the expected number (None: judge by the names), `splits` those that must exist."""

    classes: int | None = None
    splits: tuple[str, ...] = ("train", "val")
    decode: bool = False
    workers: int = 1


class Flaw(NamedTuple):
    """What is wrong with an image's bytes."""

    severity: Severity
    what: str
    fix: str


_REPLACE = "download the file again, or delete it"
_SAVE_AGAIN = "save it with 8 bits, or delete it"
_CONVERTED = "nothing to do: vimfast-prepare stores it as an RGB JPEG, and training from the folder converts it too"
_ODD = "look at the image; if it is damaged, download the file again"


def check_image(data: bytes, extension: str | None, decode: bool) -> tuple[jpeg.ImageInfo | None, list[Flaw]]:
    """Check an image's header and end; decode it if requested or if it looks damaged.

    Args:
        extension: with its dot, in lower case; None if the name does not matter.

    Returns:
        What the header says, None if these bytes are not an image, and what is wrong.

    Raises:
        UserError: there is too little memory to decode it.
    """
    try:
        return _check_image(data, extension, decode)
    except MemoryError:
        raise UserError("there is too little memory to decode an image", "free some, or lower --workers") from None


def _check_image(data: bytes, extension: str | None, decode: bool) -> tuple[jpeg.ImageInfo | None, list[Flaw]]:
    if not data:
        return None, [Flaw("error", "empty (0 bytes)", _REPLACE)]
    try:
        info = jpeg.inspect(data)
    except ValueError as error:
        said = str(error)
        return None, [Flaw("error", said if said.startswith("not an image") else f"not an image: {said}", _REPLACE)]
    complete = b"IEND" in data[-64:] if info.format == "png" else info.complete
    uncommon = info.format not in _KNOWN_BY_HEADER  # the header does not say whether it decodes
    if (decode or uncommon or not complete) and (why := _why_undecodable(data)):
        what = "does not decode" if complete else "cut off or damaged"
        fix = _SAVE_AGAIN if info.format.endswith("bit") else _REPLACE
        return info, [Flaw("error", f"{what}: {why}", fix)]  # whatever else is unusual about it
    flaws = []
    if extension is not None and extension not in EXTENSIONS.get(info.format.partition("-")[0], ()):
        flaws.append(Flaw("warning", f"a {info.format.upper()} by its content", _CONVERTED))
    if info.format == "jpeg" and info.components not in (1, 3):
        flaws.append(Flaw("warning", f"a JPEG of {info.components} components (CMYK)", _CONVERTED))
    elif info.format.startswith("jpeg-"):
        flaws.append(Flaw("warning", f"an uncommon kind of JPEG ({info.format})", _CONVERTED))
    try:
        wide = jpeg.wide_samples(data)
    except ValueError as error:
        flaws.append(Flaw("error", str(error), _REPLACE))
    else:
        if wide:
            flaws.append(Flaw("warning", f"a {wide} {info.format.upper()}, scaled to 8 bits", _CONVERTED))
    if not complete:
        flaws.append(Flaw("warning", "looks damaged (junk, or no end marker) but decodes", _ODD))
    return info, flaws


def _why_undecodable(data: bytes) -> str | None:
    try:
        with Image.open(BytesIO(data)) as image:
            image.load()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's parsers raise nearly anything on garbage
        return jpeg.why_undecodable(error, data)
    return None


@dataclass(frozen=True)
class ClassCheck:
    """Whether the classes are the expected ones, each with its images.

    They are compared with ImageNet-1k if most of the names are from it, unless another number of classes is expected.
    Asking for 1,000 explicitly turns deviations in names and numbers of images into warnings.

    Attributes:
        counts: split -> class name -> images.
        expected: the number of classes; None: 1,000 for ImageNet, otherwise the splits need only agree.
        place: the path that a person finds a class (``""``: a split) by.
        fix: what to do if classes or images are missing.
        or_else: a tail for it, of what else may be done about a class that holds nothing.
    """

    counts: Mapping[str, Mapping[str, int]]
    expected: int | None
    place: Callable[[str, str], str]
    fix: str
    or_else: str = ""

    def run(self) -> Iterator[Finding]:
        names = sorted(set().union(*self.counts.values()))
        wnids = imagenet_wnids(names) if self.expected in (None, IMAGENET_CLASSES) else frozenset()
        if self.expected is None and self._is_subset(wnids):
            yield self._subset(len(names))
            wnids = frozenset()  # to which they are not held
        for split, held in self.counts.items():
            yield from self._check_number(split, bool(wnids))
            yield from self._check_missing(split, wnids)
            for name in (name for name, images in held.items() if not images):
                yield self._error(split, name, "holds no images", self.fix + self.or_else)
            if wnids:
                yield from self._check_imagenet(split, wnids)
        if all(name.isdecimal() for name in names) and names != (by_value := sorted(names, key=int)):
            place = next(i for i, name in enumerate(names) if name != by_value[i])
            what = f"class names are numbers but sorted as text, so that {names[place]!r} is class {place}"
            fix = "pad the numbers with zeros if the model's outputs are to be in numerical order"
            yield Finding("warning", "", self.place(next(iter(self.counts)), ""), what, fix)

    def _is_subset(self, wnids: frozenset[str]) -> bool:
        """Whether each split has the same part of ImageNet-1k's classes, and no other class."""
        first, *others = (set(held) for held in self.counts.values())
        return first < wnids and all(held == first for held in others)

    def _subset(self, found: int) -> Finding:
        same = f", the same in {' and '.join(self.counts)}" if len(self.counts) > 1 else ""
        what = f"looks like a subset of ImageNet-1k: {found:,} of its {IMAGENET_CLASSES:,} classes{same}"
        fix = f"pass --classes {found} if that is what you want; otherwise add the other classes"
        return Finding("error", "", self.place(next(iter(self.counts)), ""), what, fix)

    @property
    def _strict(self) -> Severity:
        """How severe a deviation from ImageNet-1k as published is."""
        return "error" if self.expected is None else "warning"

    def _error(self, split: str, name: str, what: str, fix: str) -> Finding:
        return Finding("error", split, self.place(split, name), what, fix)

    def _check_number(self, split: str, is_imagenet: bool) -> Iterator[Finding]:
        found, expected = len(self.counts[split]), IMAGENET_CLASSES if is_imagenet else self.expected
        if expected is None or found == expected:
            return
        what = f"has {counted(found, 'class')}, {'ImageNet-1k has' if is_imagenet else '--classes says'} {expected:,}"
        fix = self.fix if found < expected else "move away the folders that are not classes"
        yield self._error(split, "", what, f"{fix}, or pass --classes {found} if that is what you have")

    def _check_missing(self, split: str, wnids: frozenset[str]) -> Iterator[Finding]:
        held = self.counts[split]
        for name in sorted(wnids.union(*self.counts.values()) - set(held)):
            others = [other for other in self.counts if name in self.counts[other]]
            severity = "error" if others else self._strict
            what = f"missing, a class of {(*others, 'ImageNet-1k')[0]}"
            yield Finding(severity, split, self.place(split, name), what, self.fix)

    def _check_imagenet(self, split: str, wnids: frozenset[str]) -> Iterator[Finding]:
        """Names and numbers of images against ImageNet-1k's."""
        held = self.counts[split]
        for name in sorted(set(held) - wnids):
            fix = f"move it away or rename it, or pass --classes {len(held)} if these are not ImageNet-1k's classes"
            yield Finding(self._strict, split, self.place(split, name), "not a class of ImageNet-1k", fix)
        fix = f"{self.fix}, or pass --classes {IMAGENET_CLASSES} if other numbers of images are intended"
        least, most = IMAGENET_PER_CLASS[split]
        usual = f"{least:,} to {most:,}" if least < most else f"exactly {least}"
        for name, images in held.items():
            if images and name in wnids and not least <= images <= most:
                what = f"holds {counted(images, 'image')}, ImageNet-1k's classes hold {usual}"
                yield Finding(self._strict, split, self.place(split, name), what, fix)
        total = sum(held.values())
        if total != IMAGENET_IMAGES[split] and wnids <= set(held):
            what = f"holds {total:,} images, ImageNet-1k has {IMAGENET_IMAGES[split]:,}"
            yield Finding(self._strict, split, self.place(split, ""), what, fix)


def imagenet_wnids(names: Iterable[str]) -> frozenset[str]:
    """ImageNet-1k's 1,000 class names, if most of `names` are among them; else nothing."""
    names = set(names)
    wnids = frozenset(_timm_wnids())
    return wnids if 2 * len(wnids & names) > len(names) else frozenset()


def _timm_wnids() -> list[str]:
    """From the file with timm's own list: importing timm brings in torch and takes seconds."""
    spec = importlib.util.find_spec("timm")
    for folder in (spec and spec.submodule_search_locations) or []:
        if (file := Path(folder, "data", "_info", "imagenet_synsets.txt")).is_file():
            return file.read_text().split()
    from timm.data.imagenet_info import ImageNetInfo  # in case timm has moved the file

    return list(ImageNetInfo().label_names())


class Tally(NamedTuple):
    """The result for a few images; `sizes` are their heights and widths, int64 [n, 2], where nothing else says them."""

    images: int
    bytes: int
    findings: list[Finding]
    sizes: np.ndarray = np.zeros((0, 2), np.int64)


def run_tasks(
    function: Callable[..., Tally], tasks: Iterable[tuple[Any, ...]], title: str, total: int, workers: int
) -> Iterator[Tally]:
    """``function(*task)`` for every task, in order, in `workers` processes, with a bar on a terminal.

    Tasks are taken from the iterator only as workers become free.

    Args:
        total: images in all tasks.

    Raises:
        UserError: a worker was killed.
    """
    columns = (
        TextColumn("{task.description}"),
        BarColumn(None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("left"),
    )
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, expand=True, disable=not console.is_terminal) as progress:
        bar = progress.add_task(title, total=total, rate="")
        alone = total <= _FEW or workers == 1
        for tally in itertools.starmap(function, tasks) if alone else _spread(function, tasks, workers):
            speed = progress.tasks[0].speed
            progress.update(bar, advance=tally.images, rate=f"{speed:,.0f} images/s" if speed else "")
            yield tally


def _spread(function: Callable[..., Tally], tasks: Iterable[tuple[Any, ...]], workers: int) -> Iterator[Tally]:
    context = multiprocessing.get_context("spawn")  # a fork would copy the locks of the caller's threads
    waiting: deque[Future[Tally]] = deque()
    with ProcessPoolExecutor(workers, context, _start_worker) as pool:
        try:
            for task in tasks:
                waiting.append(pool.submit(function, *task))
                if len(waiting) >= 4 * workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool:
            raise UserError("a checking process was killed, perhaps for lack of memory", "lower --workers") from None
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers
    warnings.simplefilter("ignore")  # Pillow's, on odd metadata of images that decode
    threading.Thread(target=end_with_parent, daemon=True).start()
