"""What the tools conclude from their measurements."""

from __future__ import annotations

import json
import math
import os
import re
import runpy
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from runs import FORKING, TINY, environment
from watch import Line, Watched

from vimfast.errors import UserError

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture(autouse=True)
def _tools_import_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))


@pytest.mark.parametrize(
    ("a", "b", "said"),
    [
        # variances 4 and 4 over 3 seeds each: a standard error of sqrt(8 / 3) = 1.633, twice that 3.27
        ([10.0, 12.0, 14.0], [13.0, 15.0, 17.0], "a difference of +3, within"),
        ([10.0, 12.0, 14.0], [13.5, 15.5, 17.5], "a difference of +3.5, beyond"),
        ([10.0, 12.0, 14.0], [5.0, 7.0, 9.0], "a difference of -5, beyond"),
        ([10.0], [10.0, 11.0], "one seed shows no spread"),
    ],
)
def test_means_are_compared_with_twice_their_standard_error(a: list[float], b: list[float], said: str) -> None:
    assert said in runpy.run_path(str(TOOLS / "comparison.py"))["verdict"]("first", a, "second", b)


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


def test_rows_of_gpus_are_measured_and_a_failed_one_says_why(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The real trainer on two processes; a row that needs more images than there are says so."""
    script = runpy.run_path(str(TOOLS / "bench_gpus.py"))
    inner = script["main"].__globals__
    monkeypatch.setitem(inner, "TORCHRUN", FORKING)  # one import of torch instead of three
    real, rates = inner["resident"], []

    def resident(*args: Any) -> float:
        rates.append(2 * rates[-1] if rates else real(*args))  # measured once, then made up
        return rates[-1]

    monkeypatch.setitem(inner, "resident", resident)

    def run(*flags: str, status: int = 0) -> None:
        monkeypatch.setattr(sys, "argv", ["bench_gpus.py", *flags])
        assert script["main"]() == status

    rows = ("--row", "gpus=2,batch=2,aug=none,model=test_vit", "--row", "gpus=2,batch=18,model=test_vit")
    tiny = ("--input-size", "160", "--steps", "6", "--log-every", "2", "--warm-up", "1", "--seconds", "0.1")
    out = tmp_path / "rows.json"
    run(str(tree), "--device", "cpu", *tiny, "--timeout", "600", "--json", str(out), *rows)
    said = capsys.readouterr().out
    assert "0.0 GiB of training files read into memory, at 0.0" in said
    assert "failed: 36 images make 1 step, but" in said
    run(str(tree), "--device", "cpu", *tiny, *rows[2:], status=1)  # all have failed
    record = json.loads(out.read_text())
    assert {"machine", "torch", "date", "command"} < record.keys()
    row, failed = record["rows"]
    assert (row["gpus"], row["batch"], row["reports"], row["processes_left"]) == (2, 2, 2, 0)
    assert row["decoder_chosen"] == "cpu"
    assert min(row["img_s"], row["img_s_by_arrival"], row["first_step_s"], row["threads"]) > 0
    assert row["exit_s"] >= 0
    (baseline,) = record["resident"]
    assert [baseline["before"], baseline["after"]] == rates
    assert row["share"] == pytest.approx(row["img_s"] / (baseline["before"] + baseline["after"]))  # of 2 x their mean
    assert "img_s" not in failed
    run("--plot", str(out))
    assert Image.open(out.with_suffix(".png")).size[0] > 1000


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--row", "gpus=0"), "gpus is 0; it must be 1 or more"),
        (("--row", "batch=-1"), "batch is -1; it must be 1 or more"),
        (("--row", "gpus=1,cores=100000"), r"this machine has \d+ cores; request fewer"),
        (("--row", "gpus=1", "--json", "nowhere/rows.json"), "no such folder"),
        (("--row", "gpus=1", "--jsno", "rows.json"), "unknown flag --jsno; did you mean '--json'"),
        (("--plot", "nowhere.json"), "nowhere.json holds no results"),
    ],
)
def test_what_bench_gpus_refuses(
    flags: tuple[str, ...], said: str, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_gpus.py", str(tree), "--device", "cpu", *flags])
    with pytest.raises(UserError, match=said):
        runpy.run_path(str(TOOLS / "bench_gpus.py"))["main"]()


def test_two_nodes_prints_its_usage() -> None:
    for flags, status in (["--help"], 0), ([], 2), (["--device", "cpu"], 2):
        done = subprocess.run([str(TOOLS / "two_nodes.sh"), *flags], capture_output=True, text=True)
        assert done.returncode == status
        assert "tools/two_nodes.sh DATA --output_dir RUN [flags of vimfast.train]" in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        (["epoch 0 [1/2]", "error: no such folder; give another", "W1 torch/distributed", "====="], "error: no such"),
        (["[rank1]: torch.OutOfMemoryError: CUDA", "ChildFailedError:", "exitcode : 1"], "[rank1]: torch.OutOfMemory"),
        (["epoch 0 [1/2]", ""], "epoch 0 [1/2]"),
        ([], "no output"),
    ],
)
def test_the_line_that_reports_a_failure(lines: list[str], said: str) -> None:
    script = runpy.run_path(str(TOOLS / "bench_gpus.py"))
    assert script["last_words"]([Line(0.0, text, True) for text in lines]).startswith(said)


def test_a_command_that_hangs_is_ended_with_all_it_started() -> None:
    hang = "import subprocess, time; subprocess.Popen(['sleep', '600'], start_new_session=True)"
    hang += "; print('started', flush=True); time.sleep(600)"
    with Watched([sys.executable, "-c", hang]) as run:
        run.wait_for("started", 60)
        end = time.monotonic() + 60
        while len(run.processes()) != 2:  # the second may not have taken on its name yet
            assert time.monotonic() < end, run.processes()
            time.sleep(0.05)
        assert run.usage().memory > 0
        with pytest.raises(TimeoutError, match="started"):
            run.wait(0.1)
        assert not run.processes()
    assert run.process.returncode < 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.9])
def test_the_demo_knows_the_lowest_loss_of_smoothed_labels(smoothing: float) -> None:
    floor = runpy.run_path(str(TOOLS / "demo.py"))["smoothed_floor"](smoothing, 10)
    label = torch.tensor([0])
    logits = torch.full((1, 10), smoothing / 10 + 1e-12).log()
    logits[0, 0] = math.log(1 - smoothing + smoothing / 10)
    assert F.cross_entropy(logits, label, label_smoothing=smoothing).item() == pytest.approx(floor, abs=1e-6)
    assert F.cross_entropy(logits * 1.1, label, label_smoothing=smoothing).item() >= floor - 1e-6


def test_how_soon_a_recipe_is_how_good(tree: Path, tmp_path: Path) -> None:
    """A real run of two epochs; and what is made of several."""
    from bench_recipe import Evaluated, Trained, mean

    recipe, figures = tmp_path / "tiny.yaml", tmp_path / "figures.json"
    recipe.write_text(yaml.safe_dump(TINY))
    words = [str(tree), "--recipes", str(recipe), "--seeds", "1", "--target", "0", "--out", str(tmp_path / "runs")]
    own = ["--json", str(figures), "--", "--epochs", "2", "--steps-per-epoch", "1", "--no-repeated-aug"]
    command = [sys.executable, str(TOOLS / "bench_recipe.py"), *words, *own]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment()})
    assert done.returncode == 0, done.stderr
    (run,) = json.loads(figures.read_text())
    logged = [json.loads(line) for line in (tmp_path / "runs" / "tiny-seed1" / "log.txt").open()]
    for weights, name in (("trained", "test_acc1"), ("averaged", "ema_test_acc1")):
        seen = [e["top1"] for e in run["evaluations"] if e["weights"] == weights]
        assert seen == pytest.approx([record[name] for record in logged], abs=6e-3)
    times = [e["seconds"] for e in run["evaluations"]]
    assert 0 < times[0] <= times[-1] <= run["seconds"]
    assert len([line for line in done.stdout.splitlines() if " trained " in line or " averaged " in line]) == 2

    pairs = [(10, "trained", 5.0), (20, "trained", 30.0), (20, "averaged", 28.0), (30, "trained", 29.0)]
    pairs += [(30, "averaged", 31.0)]
    trained = Trained("x", 0, 33.0, [Evaluated(*pair) for pair in pairs])
    assert [trained.reached(29, weights) for weights in ("trained", "averaged")] == [20, 30]
    assert trained.reached(40, "trained") is None
    assert (trained.within(25, "trained"), trained.within(99, "averaged")) == (30.0, 31.0)
    assert trained.within(5, "trained") is None
    assert (mean([1.0, 3.0], 1), mean([1.0, None], 0), mean([None], 0)) == ("2.0 ± 1.4", "1 (1 of 2)", "-")


def test_nothing_was_measured_below_its_floor() -> None:
    """fp32 blocks were, by the rate of the GPU's fp32 cores, while their products run on its tensor cores."""
    records = [TOOLS.parent / "docs" / name for name in ("bench_kernels.json", "bench_train.json")]
    figures = [figure for record in records for figure in json.loads(record.read_text())["figures"]]
    shares = [f[name] / f[name.replace("floor_", "")] for f in figures for name in f if name.endswith("floor_ms")]
    assert len(shares) > 30
    assert max(shares) < 1


def test_fp32_products_are_as_fast_as_the_gpus_units_for_them() -> None:
    from floors import H200, RTX_4090, scaled

    assert scaled("half an H200", (9, 0), 66, 1.98e9, 4.1e12).fp32_products == pytest.approx(H200.fp32_products / 2)
    assert H200.fp32_products == pytest.approx(494.7e12 / 3)
    other = scaled(RTX_4090.name, (8, 9), 128, 2.52e9, RTX_4090.copy)
    assert other.fp32_products == pytest.approx(RTX_4090.fp32_products, rel=0.01)


def test_the_hours_of_a_recipe() -> None:
    """At half the floor of the other GPU; 3 epochs of 7.2 million images at 1,000/s are 6 hours."""
    from bench_stages import Measured, arithmetic, table
    from floors import H200, RTX_4090

    stage = Measured("stage 1", 3, 64, 100, 8, 100.0, 4.25, (0.010, 0.020))
    assert (stage.rate, stage.predicted) == (1000, 500)
    assert arithmetic([stage, stage], [7_200_000, 3_600_000], [1000.0, 500.0]) == [
        "stage 1: 3 x 7,200,000 images / 1,000 img/s = 6.00 h",
        "stage 1: 3 x 3,600,000 images / 500 img/s = 6.00 h",
        "in all 12.00 h",
    ]
    row = [next(iter(column.cells)) for column in table([stage], (H200, RTX_4090)).columns]
    assert row == ["stage 1", "3", "64", "8 x 100", "100.00", "1,000", "500", "4.2", "10.00", "2.00"]


def test_a_recipe_is_timed_at_the_sizes_and_batches_of_its_stages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    stages = [{"share": 0.5, "input_size": 24, "batch_size": 3, "accum_steps": 2}, {}]
    recipe.write_text(yaml.safe_dump({**TINY, "schedule": {"epochs": 4, "stages": stages}, "ema": {"model_ema": True}}))
    monkeypatch.setattr(sys, "argv", ["bench_stages.py", str(recipe), "--images", "1000", "--repeats", "1"])
    runpy.run_path(str(TOOLS / "bench_stages.py"))["main"]()
    said = capsys.readouterr().out
    rows = [[cell.strip() for cell in line.split("│")] for line in said.splitlines() if "│" in line]
    assert [row[1:5] for row in rows] == [
        ["stage 1", "2", "24", "2 x 3"],
        ["stage 2", "2", "40", "1 x 2"],
        ["evaluations", "4", "40", "1 x 2"],
    ]
    assert "stage 1: 2 x 1,000 images" in said
    assert "predicted" not in said


def test_a_large_set_is_measured_without_its_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vimfast.shards.rows.MOST_IN_MEMORY", 1)
    monkeypatch.setattr("vimfast.data.order.MOST_DRAWN", 1)
    monkeypatch.setattr(sys, "argv", ["bench_large.py", str(tmp_path / "large"), "--images", "50000"])
    runpy.run_path(str(TOOLS / "bench_large.py"), run_name="__main__")
    assert capsys.readouterr().out.startswith("50,000 images: open in 0.")


def test_sanitizer_watches_every_kernel() -> None:
    """Each that a `launch` module of the kernels starts, by the beginning of its name."""
    watched = runpy.run_path(str(TOOLS / "sanitize.py"))["KERNELS"]
    launches = (TOOLS.parent / "kernels" / "vimfast_kernels").glob("**/*.py")
    started = {
        name for path in launches for name in re.findall(r"^ +(\w+)\[[(g].*\]\(", path.read_text(), re.MULTILINE)
    }
    assert {"scan_backward", "conv_backward_of_sum", "norm_forward", "judge", "_sum_rows"} <= started
    assert [name for name in started if not name.startswith(watched)] == []
    assert [name for name in watched if not any(own.startswith(name) for own in started)] == []


def test_the_sanitizer_lists_its_kernels_and_refuses_what_is_never_launched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A filter that matches nothing found nothing wrong."""
    sanitize = runpy.run_path(str(TOOLS / "sanitize.py"))
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--help"])
    with pytest.raises(SystemExit):
        sanitize["main"]()
    assert set(sanitize["KERNELS"]) <= set(capsys.readouterr().out.split())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    monkeypatch.setattr(sys, "argv", ["sanitize.py", "--kernels", "split", "product"])
    with pytest.raises(UserError, match=r"launches no split or product, which are for compute capability 9.0"):
        sanitize["main"]()
