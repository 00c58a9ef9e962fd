"""A page about a check: classes, sizes and shapes of the images, and findings with thumbnails."""

from __future__ import annotations

import itertools
import tarfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from vimfast import __version__
from vimfast.checks.findings import Finding, Kind, Report
from vimfast.class_names import english_names
from vimfast.errors import counted, in_bytes, printable
from vimfast.files import atomic_write
from vimfast.image_size import ImageSize, SizeLike
from vimfast.pages import Bar, BarChart, render, thumbnail
from vimfast.shards.origin import MOST_BYTES, read_image
from vimfast.shards.tree import is_image_name

_TEMPLATE = Path(__file__).parent / "check.html"
_GROUPS, _LINES, _SHOWN = 40, 12, 6  # findings on a page: kinds, lines of a kind, thumbnails of a kind
_FEW_CLASSES = 40  # so many are shown by name, of more the extremes
_EXTREMES = 10
_BINS, _FEW_BARS = 40, 6
_TAIL = 0.995  # of the images lie below the end of a scale
_WIDEST = 4.0  # of a scale of shapes: width over height


def write_page(report: Report, out: Path, input_size: SizeLike) -> None:
    """Write the page, atomically.

    Args:
        input_size: of images in training, pixels; smaller ones are counted.

    Raises:
        OSError: it cannot be written.
    """
    page = render(
        _TEMPLATE,
        report=report,
        groups=list(_groups(report)),
        left_out=max(0, len(report.findings.by_kind()) - _GROUPS),
        splits=[SplitPage(summary.split, report, ImageSize.of(input_size)) for summary in report.splits],
        classes=_classes(report.classes),
        in_bytes=in_bytes,
        version=__version__,
        written=time.strftime("%Y-%m-%d %H:%M"),
    )
    with atomic_write(out) as file:
        file.write(page)


# Findings


class _Shown(NamedTuple):
    """An image that something is wrong with; no thumbnail where it does not decode."""

    name: str
    what: str
    thumbnail: bytes | None


class _Group(NamedTuple):
    """Findings with one fix: how many there were, the first as lines, and images among them."""

    kind: Kind
    total: int
    lines: list[Finding]
    images: list[_Shown]


def _groups(report: Report) -> Iterator[_Group]:
    for kind, findings in report.findings.by_kind()[:_GROUPS]:
        about_images = ((finding, name) for finding in findings if (name := _image_name(finding.file)))
        images = [
            _Shown(name, finding.what, _thumbnail(finding.file))
            for finding, name in itertools.islice(about_images, _SHOWN)
        ]
        lines = [Finding(f.severity, f.split, printable(f.file), printable(f.what), f.fix) for f in findings[:_LINES]]
        yield _Group(kind, report.findings.of_kind(kind), lines, images)


def _image_name(file: str) -> str:
    """Of what a finding is about, if that is an image: the end of its path, or the member of its shard."""
    tar, _, member = file.partition(".tar: ")
    if member and is_image_name(member):
        return printable(f"{Path(tar).name}.tar: {member}")
    return printable("/".join(Path(file).parts[-2:])) if is_image_name(file) and Path(file).is_file() else ""


def _thumbnail(file: str) -> bytes | None:
    tar, _, member = file.partition(".tar: ")
    try:
        return thumbnail(_member(Path(f"{tar}.tar"), member) if member else read_image(Path(file)))
    except (OSError, ValueError, KeyError, tarfile.TarError):
        return None


def _member(tar: Path, name: str) -> bytes:
    with tarfile.open(tar) as opened:
        for member in opened:
            if member.name == name and (file := opened.extractfile(member)) is not None:
                return file.read(MOST_BYTES)
    raise KeyError(name)


# Classes


class _Class(NamedTuple):
    """A class, and its images in each split."""

    name: str
    english: str
    images: list[int]


def _classes(counts: Mapping[str, Mapping[str, int]]) -> list[tuple[str, list[_Class]]]:
    """Tables of classes with their titles: of all, or of the smallest and largest in the first split if they differ."""
    names = sorted(set().union(*counts.values())) if counts else []
    english = dict(zip(names, english_names(names), strict=True))
    rows = [
        _Class(printable(name), printable(english[name]), [held.get(name, 0) for held in counts.values()])
        for name in names
    ]
    if len(rows) <= _FEW_CLASSES:
        return [("All classes", rows)] if rows else []
    if all(row.images == rows[0].images for row in rows):
        return []
    rows.sort(key=lambda row: row.images)
    return [("Smallest classes", rows[:_EXTREMES]), ("Largest classes", rows[: -_EXTREMES - 1 : -1])]


def _class_chart(split: str, held: np.ndarray) -> BarChart:
    """How many classes there are of each size; int64 [K]."""
    edges = _edges(int(held.min()), int(held.max()))
    bars = [
        Bar(left, right, count, f"{_span(left, right - 1)} images: {counted(count, 'class')}")
        for (left, right), count in _counted(held, edges)
    ]
    return BarChart(f"Classes of {split}, by their images", "images in the class", bars, _middles(bars))


def _edges(least: int, most: int) -> list[int]:
    """Of bins that hold whole numbers from `least` to `most`, as many in each; a lone one has empty ones beside it."""
    width = max(1, -(-(most - least + 1) // _BINS))
    edges = list(range(least, most + width + 1, width))
    return edges if len(edges) > 2 else [least - 1, *edges, most + 2]


def _counted(values: np.ndarray, edges: Sequence[float]) -> Iterator[tuple[tuple[Any, Any], int]]:
    """The sides of each bin, and how many values are in it."""
    return zip(itertools.pairwise(edges), np.histogram(values, edges)[0].tolist(), strict=True)


def _middles(bars: Sequence[Bar]) -> list[tuple[float, str]] | None:
    """Labels for a few bars, each of which is one number or a few; None: for many, labels at round numbers."""
    if len(bars) > _FEW_BARS:
        return None
    return [((bar.left + bar.right) / 2, _span(int(bar.left), int(bar.right) - 1)) for bar in bars if bar.height]


def _span(first: int, last: int) -> str:
    return f"{first:,}" if first == last else f"{first:,} to {last:,}"


# Images


@dataclass(frozen=True)
class SplitPage:
    """What the template asks of a split."""

    name: str
    report: Report
    input_size: ImageSize

    @property
    def _sizes(self) -> np.ndarray:
        return self.report.sizes.get(self.name, np.zeros((0, 2), np.int64))

    @property
    def _short(self) -> np.ndarray:
        short: np.ndarray = self._sizes.min(axis=1)
        return short

    @property
    def median(self) -> str:
        """Of the sizes, by their area: ``500 × 375``."""
        if not len(self._sizes):
            return ""
        height, width = self._sizes[
            np.argsort(self._sizes.prod(axis=1, dtype=float), kind="stable")[len(self._sizes) // 2]
        ].tolist()
        return f"{width:,} × {height:,}"

    @property
    def smaller(self) -> int:
        """How many of them are smaller than the input."""
        return int((self._sizes < self.input_size).any(axis=1).sum())

    @property
    def limit(self) -> str:
        """What those are below, by a flag that not everybody gives."""
        height, width = self.input_size
        if height == width:
            return f"short side below {height} pixels, for training with --input-size {height}"
        what = f"below {height} pixels in height or {width} in width"
        return f"{what}, for training with --input-size {height} {width}"

    @property
    def commonest(self) -> list[tuple[str, int]]:
        """(size, images) of the most frequent sizes."""
        found, counts = np.unique(self._sizes, axis=0, return_counts=True)
        order = np.argsort(-counts, kind="stable")[:8]
        return [
            (f"{width:,} × {height:,}", int(count))
            for (height, width), count in zip(found[order].tolist(), counts[order].tolist(), strict=True)
        ]

    @cached_property
    def charts(self) -> list[BarChart]:
        held = np.array(list(self.report.classes.get(self.name, {}).values()), np.int64)
        charts = [_class_chart(self.name, held)] if len(held) else []
        return [*charts, self._sides(), self._shapes()] if len(self._sizes) else charts

    def _sides(self) -> BarChart:
        short = self._short
        edges = _edges(int(short.min()), int(np.quantile(short, _TAIL, method="lower")))
        more = " or more" if int(short.max()) >= edges[-1] else ""
        bars = [
            Bar(
                left,
                right,
                count,
                f"{_span(left, right - 1)}{more * (right == edges[-1])} pixels: {counted(count, 'image')}",
            )
            for (left, right), count in _counted(np.minimum(short, edges[-1] - 1), edges)
        ]
        title = f"Images of {self.name}, by their short side"
        marks = _middles(bars)
        if marks and more and bars[-1].height:
            marks[-1] = marks[-1][0], f"{marks[-1][1]}{more}"
        return BarChart(title, "short side, pixels", bars, marks)

    def _shapes(self) -> BarChart:
        """On a scale where 1:2 is as far from a square as 2:1."""
        height, width = np.maximum(self._sizes, 1).T
        ratio = np.log2(width / height)
        most = np.log2(_WIDEST)
        edges = np.linspace(-most, most, _BINS + 2)  # an odd number of bins: squares are in the middle of one
        bars = [
            Bar(left, right, count, f"{2**left:.2f} to {2**right:.2f}: {counted(count, 'image')}")
            for (left, right), count in _counted(np.clip(ratio, -most, most), edges.tolist())
        ]
        named = ((1, 3), (1, 2), (3, 4), (4, 3), (2, 1), (3, 1))
        marks = [(float(np.log2(wide / tall)), f"{wide}:{tall}") for wide, tall in named]
        return BarChart(f"Images of {self.name}, by their shape", "width : height", bars, marks, colour=3)
