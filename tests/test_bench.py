"""``vimfast bench`` on a CPU, at the smallest size."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from vimfast.commands import bench
from vimfast.errors import UserError
from vimfast.models.vision_mamba import VisionMamba
from vimfast.speed import Subject, timings

SMALL = ("--device", "cpu", "--input-size", "16", "--batch-size", "2", "--seconds", "0.05")
Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["vimfast bench", *SMALL, *words])
        bench.main()
        out, err = capsys.readouterr()
        sys.stderr.write(err)  # for a test that reads it too
        return out

    return call


def test_a_model_and_its_data(run: Run, tree: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plot = tmp_path / "speed.png"
    record = json.loads(run(str(tree), "--no-deit", "--json", "--plot", str(plot)))
    assert capsys.readouterr().err.splitlines()[-1] == f"written to {plot}"
    assert record["machine"].endswith("2 images of 16 pixels a step, fp32")
    figures = record["figures"]
    assert [f["what"] for f in figures] == ["training", "inference", "loading"]
    for f in figures[:2]:
        assert f["of"] == "vim_tiny_patch16_224"
        assert f["img_s"] == pytest.approx(2000 / f["ms"])
        assert f["spread"] > 0
    assert figures[2]["of"] == str(tree)
    assert figures[2]["img_s"] > 0 < figures[2]["cores"]
    with Image.open(plot) as image:
        assert image.width > 800


def test_deit_of_the_same_size_stands_beside_it(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    built, build = [], Subject.build

    def small(subject: Subject, device: object) -> object:
        built.append((subject.model, subject.compiled))
        return build(Subject("deit_tiny_patch16_224", subject.batch, subject.size, amp=False), device)  # type: ignore[arg-type]

    monkeypatch.setattr(Subject, "build", small)
    said = " ".join(run("--model", "vim_small_patch16_224").split())
    assert built == [("vim_small_patch16_224", False), ("deit_small_patch16_224", False)] * 2
    assert "compiled" not in said
    for what in ("training", "inference"):
        assert re.search(rf"{what}: \d+\.\d\d times the rate of DeiT", said)


@pytest.mark.parametrize("kernels", ["llvm (no GPU; training: reference)", "reference (no GPU)"])
def test_inference_alone_and_its_kernels(run: Run, monkeypatch: pytest.MonkeyPatch, kernels: str) -> None:
    monkeypatch.setattr(VisionMamba, "kernels", lambda *_: kernels)
    said = run("--no-training", "--no-deit")
    assert "inference" in said
    assert "training " not in said
    assert f"kernels {kernels}" in said
    assert ("pip install 'vimfast[cpu]'" in said) == kernels.startswith("reference")


def test_models_are_measured_in_turn() -> None:
    order: list[str] = []
    runs = [lambda: order.append("a"), lambda: order.append("b")]
    times = [timed.ms for timed in timings(runs, torch.device("cpu"), [5, 10])]
    assert order == [*"aaabbb", *("abb" * 5)]
    assert len(times) == 2


def test_what_it_refuses(run: Run, tmp_path: Path) -> None:
    for words, sentence in (
        (("--scan-backend", "fast"), "unknown scan backend 'fast'"),
        (("--model", "vim_tny"), "did you mean 'vim_tiny_patch16_224'"),
        (("--plot", str(tmp_path / "no" / "a.png")), "in a folder that does not exist"),
        (("--batch-size", "0"), "--batch-size is 0; it must be >= 1"),
        ((str(tmp_path / "nowhere"),), "nowhere does not exist"),
    ):
        with pytest.raises(UserError, match=sentence):
            run(*words)


def test_a_machine_that_is_busy_is_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stretches of 1, 2, ... seconds: the figures are that uncertain."""
    now = (n * n / 2 for n in range(10**6))
    monkeypatch.setattr("vimfast.speed.steps.time.perf_counter", lambda: next(now))
    said = " ".join(run("--no-deit").split())
    assert re.search(r"they differ by up to \d+%: the machine is busy", said), said
