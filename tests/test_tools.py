"""What the tools conclude from their figures."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(autouse=True)
def _tools_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


@pytest.mark.parametrize(
    ("a", "b", "told"),
    [
        # variances 4 and 4 over 3 seeds each: a standard error of sqrt(8 / 3) = 1.633, twice that 3.27
        ([10.0, 12.0, 14.0], [13.0, 15.0, 17.0], "a difference of +3, within"),
        ([10.0, 12.0, 14.0], [13.5, 15.5, 17.5], "a difference of +3.5, beyond"),
        ([10.0, 12.0, 14.0], [5.0, 7.0, 9.0], "a difference of -5, beyond"),
        ([10.0], [10.0, 11.0], "one seed tells no spread"),
    ],
)
def test_means_are_compared_with_twice_their_standard_error(a: list[float], b: list[float], told: str) -> None:
    assert told in runpy.run_path(str(TOOLS / "comparison.py"))["verdict"]("first", a, "second", b)


@pytest.mark.parametrize(
    ("needed", "flags"),
    [
        (None, "for 20,000 img/s: --data-path shards --decoder hardware --num-workers 8 --prefetch 3"),
        (5_600, "for 6,900 img/s: --data-path shards --decoder cpu --num-workers 14 --prefetch 3"),
        (7_000, "for 9,000 img/s: --data-path shards --decoder cuda --num-workers 12 --prefetch 3"),
        (
            19_000,
            "for 20,000 img/s, which may not keep 19,000 img/s fed: --data-path shards --decoder hardware "
            "--num-workers 8 --prefetch 3",
        ),
    ],
)
def test_flags_for_training_spare_the_gpu(needed: float | None, flags: str) -> None:
    script = runpy.run_path(str(TOOLS / "bench_loader.py"))
    rows = [
        script["Row"]("shards", decoder, threads, augmentation, 1, rate, 1.0, None)
        for decoder, threads, augmentation, rate in (
            ("cpu", 14, "crop", 30_000.0),
            ("hardware", 8, "recipe", 20_000.0),
            ("hardware", 16, "recipe", 20_500.0),
            ("cuda", 12, "recipe", 9_000.0),
            ("cpu", 14, "recipe", 6_900.0),
        )
    ]
    assert script["recommend"](rows, 3, needed) == flags
