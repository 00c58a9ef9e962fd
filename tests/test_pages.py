"""Charts lie inside their frames, colours can be read, and what a page is told to show stays text."""

from __future__ import annotations

import io
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from browser import look, needs_browser, screenshot
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vimfast.pages import Bar, BarChart, LineChart, Mark, Series, render, thumbnail
from vimfast.pages.charts import BOTTOM, LEFT, RIGHT, TOP, ticks

STYLE = Path(__file__).parent.parent / "vimfast" / "pages" / "style.css"
TEMPLATE = """{% extends "base.html" %}
{% from "charts.html" import lines, bars with context %}
{% block title %}{{ word }}{% endblock %}
{% block body %}<h1>{{ word }}</h1><div class="charts">{{ lines(line) }}{{ bars(bar) }}</div>
<ul class="gallery"><li><div class="image"><img src="{{ image | jpeg }}" alt=""></div>{{ word | paths }}</li></ul>
{% endblock %}
"""
values = st.lists(st.none() | st.floats(-1e6, 1e9, allow_subnormal=False), min_size=1, max_size=40)


def chart(numbers: list[float | None], **more: object) -> LineChart:
    return LineChart("loss", range(len(numbers)), "epoch", [Series("own", numbers, 1)], "{:.3g}".format, **more)


def page(folder: Path, word: str = "a/b") -> Path:
    (folder / "own.html").write_text(TEMPLATE)
    image = io.BytesIO()
    Image.new("RGB", (40, 20), "red").save(image, "JPEG")
    line = chart([3.0, 2.0, None, 1.0], mark=Mark(0, 3, "best"))
    bar = BarChart(word, "pixels", [Bar(0, 10, 3, f"{word}: 3"), Bar(10, 20, 0, "none"), Bar(20, 30, 7, "7")])
    out = folder / "page.html"
    out.write_bytes(render(folder / "own.html", word=word, line=line, bar=bar, image=thumbnail(image.getvalue())))
    return out


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_are_a_few_round_numbers_inside_the_range(low: float, span: float) -> None:
    high = low + span
    if not high - low > 1e-9 * max(abs(low), abs(high)):
        return  # too close for float64
    found = [value for value, _ in ticks(low, high)]
    assert 2 <= len(found) <= 7
    assert all(low - 1e-6 * span <= value <= high + 1e-6 * span for value in found)
    assert len({text for _, text in ticks(low, high)}) == len(found)


def test_ticks_of_counts_are_whole() -> None:
    assert ticks(0, 2, whole=True) == [(0, "0"), (1, "1"), (2, "2")]
    assert [text for _, text in ticks(0, 0.21)] == ["0.00", "0.05", "0.10", "0.15", "0.20"]


@pytest.mark.parametrize("numbers", [[100.0], [99.0, 100.0], [3.0, 97.0]])
def test_no_axis_of_percentages_reaches_beyond_100(numbers: list[float | None]) -> None:
    own = chart(numbers, limit=100.0)
    assert max(float(tick.text) for tick in own.y_ticks) <= 100
    assert all(tick.at >= TOP for tick in own.y_ticks)
    heights = [float(y) for y in re.findall(r"[ML]-?[\d.]+ (-?[\d.]+)", own.paths[0])]
    assert all(TOP <= y <= BOTTOM for y in heights)


@given(values)
def test_lines_and_what_the_pointer_shows_lie_inside_the_chart(numbers: list[float | None]) -> None:
    own = chart(numbers)
    known = [value for value in numbers if value is not None]
    assert own.empty == (not known)
    if own.empty:
        return
    (path,) = own.paths
    points = re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", path)
    assert len(points) == len(known)
    assert all(LEFT <= float(x) <= RIGHT and TOP <= float(y) <= BOTTOM for x, y in points)
    order = sorted(range(len(known)), key=lambda place: known[place])
    heights = [float(points[place][1]) for place in order]
    assert heights == sorted(heights, reverse=True)
    stops = own.stops
    assert math.isclose(sum(stop.width for stop in stops), RIGHT - LEFT, abs_tol=0.1 * len(stops) + 0.1)
    assert [dot[1] for stop in stops for dot in stop.dots] == [float(y) for _, y in points]


def test_a_gap_stays_a_gap_and_a_lone_value_is_a_dot() -> None:
    assert len(re.findall("M", chart([1.0, 2.0, None, 3.0, 4.0]).paths[0])) == 2
    assert chart([None, 1.0, None]).paths[0].endswith("h0")
    assert [tick.text for tick in chart([1.0]).x_ticks] == ["0"]


def test_a_line_leads_on_over_epochs_without_an_evaluation() -> None:
    gappy = chart([None, 1.0, None, 2.0, None, 3.0, None])
    (bridged,) = replace(gappy, series=[gappy.series[0]._replace(bridged=True)]).paths
    assert re.findall("[ML]|h0", bridged) == ["M", "L", "L"]


def test_a_long_run_has_stops_for_a_hundred_epochs_and_its_last() -> None:
    stops = chart([float(i) for i in range(1000)]).stops
    assert len(stops) == 101
    assert (stops[0].heading, stops[-1].heading) == ("epoch 0", "epoch 999")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_colours_stand_out(scheme: str) -> None:
    """Text by WCAG's 4.5 to 1, lines by its 3 to 1, on paper and on cards."""
    light, dark = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    colours = dict(re.findall(r"--(\w+): #(\w+);", light if scheme == "light" else dark))
    for ground in ("paper", "card"):
        for name in ("ink", "faint", "good", "bad", "warn"):
            assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
        for name in ("c1", "c2", "c3", "c4"):
            assert contrast(colours[name], colours[ground]) >= 3, (name, ground)


def contrast(one: str, two: str) -> float:
    """Of two colours. Source: WCAG 2.2, "contrast ratio"."""
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(colour: str) -> float:
    colour = colour if len(colour) == 6 else "".join(2 * letter for letter in colour)
    parts = [int(colour[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_names_stay_text(tmp_path: Path) -> None:
    word = "<script>alert(1)</script>\"'&</title>\udcff"
    text = page(tmp_path, word).read_text()
    assert "<script" not in text
    assert "</title>&" not in text
    assert "alert(1)&lt;/script&gt;&#34;&#39;&amp;&lt;/title&gt;\\udcff" in text


def test_thumbnails_are_small_jpegs() -> None:
    for size, kind in (((2000, 500), "JPEG"), ((8, 8), "PNG"), ((300, 400), "WEBP")):
        data = io.BytesIO()
        Image.new("L", size, 128).save(data, kind)
        small = thumbnail(data.getvalue())
        assert small is not None
        with Image.open(io.BytesIO(small)) as image:
            assert (image.format, max(image.size)) == ("JPEG", 160)
            assert image.width / image.height == pytest.approx(size[0] / size[1], rel=0.05)
    assert thumbnail(b"no image") is None


@needs_browser
def test_a_browser_shows_all_of_it_and_loads_nothing(tmp_path: Path) -> None:
    own = page(tmp_path, "<b>" + "long" * 60)
    for width, dark in ((1200, False), (400, True)):
        found, complaints = look(own, tmp_path, width=width, dark=dark)
        assert complaints == []
        assert (found["width"], found["content"]) == (width, width)
        assert (found["charts"], found["lines"], found["bars"]) == (2, 1, 2)
        assert (found["images"], found["broken"]) == (1, 0)
        assert found["outside"] == []
        assert found["paper"] == ("rgb(19, 19, 22)" if dark else "rgb(246, 246, 248)")
        assert found["columns"] == (2 if width == 1200 else 1)
        screenshot(own, tmp_path / "seen.png", width=600, height=300, dark=dark)
        with Image.open(tmp_path / "seen.png") as image:
            assert image.convert("RGB").getpixel((2, 150)) == ((19, 19, 22) if dark else (246, 246, 248))
