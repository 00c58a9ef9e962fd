"""Charts: where their lines, bars and ticks are. ``charts.html`` draws them as SVG."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# In units of the SVG. It is as wide as its column, about 370 pixels, so letters come out at about their size.
WIDTH, HEIGHT = 400, 236
LEFT, RIGHT, TOP, BOTTOM = 50, 388, 26, 198  # the sides of the plot inside it

_TICKS = 6  # at most
_MOST_STOPS = 100  # places of a chart at which the pointer shows the values
_ROOM = 0.06  # of the range, above and below the values

Format = Callable[[float], str]


class Tick(NamedTuple):
    """A place on an axis, in units of the SVG, and what is written there."""

    at: float
    text: str


class Series(NamedTuple):
    """A line: a value for each place on the x axis, None where there is none."""

    name: str
    values: Sequence[float | None]
    colour: int  # of the palette, from 1
    dashed: bool = False
    bridged: bool = False  # the line leads on over places without a value


class Mark(NamedTuple):
    """A ring around a value, and what is written beside it."""

    series: int
    place: int
    text: str


class Stop(NamedTuple):
    """What the pointer shows at a place: in a band of this width, a dot on each line, and the values."""

    x: float
    left: float
    width: float
    heading: str
    dots: list[tuple[int, float]]  # colour, y
    values: list[tuple[int, str]]  # colour, text


@dataclass(frozen=True)
class LineChart:
    """Values over epochs.

    Args:
        title: with the unit of the values.
        x: whole numbers, rising.
        x_label: what they are.
        series: at least one.
        write: a value as text.
        least, most: what the y axis reaches at least.
        limit: the largest value there can be, beyond which the y axis does not reach.
        mark: one value that stands out.
    """

    title: str
    x: Sequence[int]
    x_label: str
    series: Sequence[Series]
    write: Format
    least: float | None = None
    most: float | None = None
    limit: float | None = None
    mark: Mark | None = None

    @cached_property
    def _values(self) -> list[float]:
        return [value for series in self.series for value in series.values if value is not None]

    @property
    def empty(self) -> bool:
        return not self._values

    @cached_property
    def _range(self) -> tuple[float, float]:
        floor = [] if self.least is None else [self.least]
        ceiling = [] if self.most is None else [self.most]
        low, high = min(self._values + floor), max(self._values + ceiling)
        room = (high - low) * _ROOM or abs(high) * _ROOM or 1.0
        above = high + room if self.limit is None else min(high + room, self.limit)
        return (low if low == self.least else low - room), above

    def _x(self, value: float) -> float:
        first, last = self.x[0], self.x[-1]
        share = (value - first) / (last - first) if last > first else 0.5
        return round(LEFT + 8 + share * (RIGHT - LEFT - 16), 1)

    def _y(self, value: float) -> float:
        low, high = self._range
        return round(BOTTOM - (value - low) / (high - low) * (BOTTOM - TOP), 1)

    @property
    def x_ticks(self) -> list[Tick]:
        first, last = self.x[0], self.x[-1]
        if first == last:
            return [Tick(self._x(first), str(first))]
        step = max(1, round(nice_step(last - first)))
        return [Tick(self._x(value), f"{value:,}") for value in range(-(-first // step) * step, last + 1, step)]

    @property
    def y_ticks(self) -> list[Tick]:
        return [Tick(self._y(value), text) for value, text in ticks(*self._range)]

    @property
    def paths(self) -> list[str]:
        """Of each series, the ``d`` of its path: a piece of it for each run of values; a dot for one that is alone."""
        return [self._path(series) for series in self.series]

    def _path(self, series: Series) -> str:
        words, drawing = [], False
        places = [place for place, value in enumerate(series.values) if value is not None or not series.bridged]
        for place, after in itertools.zip_longest(places, places[1:]):
            if (value := series.values[place]) is None:
                drawing = False
                continue
            following = None if after is None else series.values[after]
            words.append(f"{'L' if drawing else 'M'}{self._x(self.x[place])} {self._y(value)}")
            if not drawing and following is None:
                words.append("h0")  # which round ends make a dot
            drawing = True
        return "".join(words)

    @property
    def ring(self) -> tuple[float, float, int, str, str] | None:
        """(x, y, colour, text, where the text is anchored) of the mark."""
        if self.mark is None or (value := self.series[self.mark.series].values[self.mark.place]) is None:
            return None
        x = self._x(self.x[self.mark.place])
        anchor = "start" if x < LEFT + 60 else "end" if x > RIGHT - 60 else "middle"
        return x, self._y(value), self.series[self.mark.series].colour, self.mark.text, anchor

    @property
    def stops(self) -> list[Stop]:
        every = max(1, -(-len(self.x) // _MOST_STOPS))
        places = list(range(0, len(self.x), every))
        if places[-1] != len(self.x) - 1:
            places.append(len(self.x) - 1)
        at = [self._x(self.x[place]) for place in places]
        edges = [LEFT, *((one + two) / 2 for one, two in itertools.pairwise(at)), RIGHT]
        return [
            self._stop(place, x, left, right - left)
            for place, x, (left, right) in zip(places, at, itertools.pairwise(edges), strict=True)
        ]

    def _stop(self, place: int, x: float, left: float, width: float) -> Stop:
        there = [(series.colour, series.values[place]) for series in self.series]
        known = [(colour, value) for colour, value in there if value is not None]
        return Stop(
            x,
            round(left, 1),
            round(width, 1),
            f"{self.x_label} {self.x[place]:,}",
            [(colour, self._y(value)) for colour, value in known],
            [(colour, self.write(value)) for colour, value in known],
        )

    @property
    def legend(self) -> list[tuple[Series, str]]:
        """Each series, with its last value."""
        last = [next((v for v in reversed(series.values) if v is not None), None) for series in self.series]
        return [
            (series, "" if value is None else self.write(value))
            for series, value in zip(self.series, last, strict=True)
        ]


class Bar(NamedTuple):
    """A bar from `left` to `right` of the x axis."""

    left: float
    right: float
    height: float
    text: str  # what the pointer shows


@dataclass(frozen=True)
class BarChart:
    """How many there are of something, over a scale.

    Args:
        title: what is counted.
        x_label: the scale, with its unit.
        bars: from left to right, without gaps.
        x_ticks_at: where the scale is labelled, and how; None: at round numbers.
        colour: of the palette, from 1.
    """

    title: str
    x_label: str
    bars: Sequence[Bar]
    x_ticks_at: Sequence[tuple[float, str]] | None = None
    colour: int = 1

    def _x(self, value: float) -> float:
        low, high = self.bars[0].left, self.bars[-1].right
        return round(LEFT + 4 + (value - low) / (high - low) * (RIGHT - LEFT - 8), 1)

    def _y(self, value: float) -> float:
        most = max(bar.height for bar in self.bars) or 1
        return round(BOTTOM - value / (most * (1 + _ROOM)) * (BOTTOM - TOP), 1)

    @property
    def x_ticks(self) -> list[Tick]:
        at = self.x_ticks_at
        if at is None:
            at = ticks(self.bars[0].left, self.bars[-1].right)
        return [Tick(self._x(value), text) for value, text in at]

    @property
    def y_ticks(self) -> list[Tick]:
        most = max(bar.height for bar in self.bars) or 1
        return [Tick(self._y(value), text) for value, text in ticks(0, most, whole=True)]

    @property
    def boxes(self) -> list[tuple[float, float, float, float, str]]:
        """(x, y, width, height, text) of each bar."""
        boxes = []
        for bar in self.bars:
            left, right, top = self._x(bar.left), self._x(bar.right), self._y(bar.height)
            gap = 1.0 if right - left > 5 else 0.0
            boxes.append((left, top, round(right - left - gap, 1), round(BOTTOM - top, 1), bar.text))
        return boxes


def nice_step(span: float) -> float:
    """1, 2 or 5 times a power of ten: at most `_TICKS` of them make `span`."""
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= span / _TICKS * 0.999)


def ticks(low: float, high: float, *, whole: bool = False) -> list[tuple[float, str]]:
    """Round numbers of this range, with as many decimals as they need.

    Args:
        whole: none between whole numbers.
    """
    step = nice_step(high - low)
    if whole:
        step = max(1.0, step)
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [(number * step, f"{number * step:,.{decimals}f}") for number in range(first, last + 1)]


def power_of_ten(most: float) -> int:
    """The exponent by which a value is best written: -3 for 0.0021."""
    return math.floor(math.log10(most)) if most > 0 else 0


_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def superscript(number: int) -> str:
    """-3 as ⁻³."""
    return str(number).translate(_SUPERSCRIPTS)
