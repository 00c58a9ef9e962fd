"""Runs under torchrun on all GPUs of a machine, two or more; what CPU processes can show too is also tested on those.

    python -m pytest -m gpus       (or: make test-gpus)

On GPUs, steps are CUDA graphs that include the exchange of gradients. A test that signals a run waits for a line of its
output and slows it down (tests/paced_train.py), so no test depends on speed. On CPUs, torchrun's workers are forks
(tests/forking_torchrun.py), which saves most of the time.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from conftest import write_image
from runs import FORKING, PACED, RECIPE, TIMEOUT, TORCHRUN, differences, records, start
from watch import Watched

from vimfast.checkpoint import load_checkpoint
from vimfast.data.order import Order
from vimfast.data.source import open_source

STEPS = 8  # in an epoch, of two
CLASSES = 3
# Seconds after the last line. This is to catch a hang: how fast a run ends depends on what else a machine does, and is
# measured by tools/bench_gpus.py.
ENDS_WITHIN = 30.0
LOST_WITHIN = 10.0  # seconds after the death of a process

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpus)]
ON_GPUS = pytest.mark.parametrize("fleet", DEVICES[1:], indirect=True)
STILL = ("--drop-path", "0", "--mixup", "0", "--cutmix", "0")  # processes draw nothing for themselves


@dataclass(frozen=True)
class Fleet:
    """The processes of a test and their data."""

    device: str
    size: int
    batch: int  # of each process
    tree: Path
    val_images: int
    recipe: Path

    @property
    def flags(self) -> tuple[str, ...]:
        return ("--config", str(self.recipe), "--data-path", str(self.tree), "--global-batch-size", str(self.images))

    @property
    def images(self) -> int:
        """Images of an update."""
        return self.size * self.batch

    @property
    def fewer(self) -> int:
        """The largest smaller number of processes that can share an update: half of 2, 4 or 8."""
        return max(n for n in range(1, self.size) if self.size % n == 0)

    def train(self, folder: Path, *flags: str, processes: int | None = None) -> Watched:
        """Start a run, on all processes by default."""
        flags = (*self.flags, "--output_dir", str(folder), *flags)
        return self._start("vimfast.train", *flags, processes=processes or self.size)

    def paced(self, folder: Path, *flags: str) -> Watched:
        """Start a run whose steps take a second."""
        return self._start(PACED, *self.flags, "--output_dir", str(folder), *flags, processes=self.size)

    def _start(self, program: str, *flags: str, processes: int) -> Watched:
        return start(program, *flags, processes=processes, launcher=FORKING if self.device == "cpu" else TORCHRUN)

    def whole(self, folder: Path, *flags: str, processes: int | None = None) -> Path:
        """Train to the end; returns the run folder."""
        with self.train(folder, *flags, processes=processes) as run:
            assert run.wait(TIMEOUT) == 0, run.text
        return folder


@pytest.fixture(scope="module", params=DEVICES)
def fleet(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """All GPUs, or two CPU processes, and images for eight steps per epoch plus some that do not fill another."""
    on_gpus = request.param == "cuda"
    root = tmp_path_factory.mktemp(request.param)
    size, batch = (torch.cuda.device_count(), 8) if on_gpus else (2, 4)
    val_images = 15 if 15 % size else 16
    for split, images in (("train", STEPS * size * batch + 3), ("val", val_images)):
        for i in range(images):
            name = f"class{i % CLASSES}"
            seed = i + 100_000 * (split == "val")
            write_image(root / split / name / f"image{i}.JPEG", seed, (70 + 7 * (i % 9), 66 + 11 * (i % 4)))
    model = {"input_size": 64, "model_kwargs": {"depth": 3}} if on_gpus else {}
    recipe = {
        **RECIPE,
        "model": {**RECIPE["model"], **model},
        "data": {**({} if on_gpus else RECIPE["data"]), "batch_size": batch},
        "run": {"device": request.param, "log_every": 1},
    }
    path = root / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return Fleet(request.param, size, batch, root, val_images, path)


@pytest.fixture(scope="module")
def undisturbed(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run, whose end is checked."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with fleet.train(folder) as run:
        assert_ends(run, fleet)
    if fleet.device == "cuda":
        assert "steps as a CUDA graph" in run.out
    return folder


@pytest.fixture(scope="module")
def stopped(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run stopped in mid-epoch by SIGTERM to torchrun. Copy it before use."""
    folder = tmp_path_factory.mktemp("stopped")
    with fleet.paced(folder) as run:
        stop(run, lambda: run.process.send_signal(signal.SIGTERM))
    assert_saved_in_mid_epoch(folder)
    return folder


@pytest.fixture(scope="module")
def still(fleet: Fleet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete run in which processes draw nothing for themselves."""
    return fleet.whole(tmp_path_factory.mktemp("still"), *STILL)


def assert_ends(run: Watched, fleet: Fleet) -> None:
    """It ends with status 0, and all its processes exit within seconds of its last line."""
    assert run.wait(TIMEOUT) == 0, run.text
    assert run.ended is not None
    last = run.lines[-1]
    assert run.ended - last.at < ENDS_WITHIN, last
    assert not run.gone_within(max(0.0, last.at + ENDS_WITHIN - time.monotonic()))


def stop(run: Watched, how: Callable[[], None]) -> None:
    """Call `how` in mid-epoch and wait for the run to end."""
    run.wait_for(r"epoch 0 \[2/", TIMEOUT)
    how()
    assert run.wait(TIMEOUT) != 0
    assert not run.gone_within(30)  # torchrun may be gone before its workers have saved


def assert_saved_in_mid_epoch(folder: Path) -> None:
    state = load_checkpoint(folder / "checkpoint.pth")
    assert 0 < state["step"] < state["steps"] == STEPS


def assert_same_run(one: Path, two: Path) -> None:
    assert differences(one, two) == []
    assert len(records(one)) == 2
    assert records(one) == records(two)


def assert_nearly_same_losses(one: Path, two: Path, bound: float) -> None:
    """The training losses of each epoch differ by at most `bound`, relatively."""
    losses = [[r["train_loss"] for r in records(folder)] for folder in (one, two)]
    assert losses[1] == pytest.approx(losses[0], rel=bound)


def test_training_ends(fleet: Fleet, undisturbed: Path) -> None:
    assert [r["epoch"] for r in records(undisturbed)] == [0, 1]


@ON_GPUS
def test_evaluation_ends_and_counts_each_image_once(fleet: Fleet, undisturbed: Path, tmp_path: Path) -> None:
    """In fp32: one GPU has batches of a different size, for which bf16 would round differently."""
    scores = []
    for processes in (fleet.size, 1):
        flags = ("--eval", "--no_amp", "--resume", str(undisturbed / "checkpoint.pth"))
        with fleet.train(tmp_path, *flags, processes=processes) as run:
            assert_ends(run, fleet)
        assert run.out.count(f"on the {fleet.val_images} test images") == 2  # by the weights and by their average
        scores.append([float(v) for line in re.findall(r"Acc@1 (\S+) Acc@5 (\S+) loss (\S+)", run.out) for v in line])
    assert len(scores[0]) == 6
    assert scores[0] == pytest.approx(scores[1], abs=2e-3)


@ON_GPUS
def test_the_same_run_gives_the_same_bits(fleet: Fleet, undisturbed: Path, tmp_path: Path) -> None:
    """On CPUs the next test shows it: a run that was stopped and resumed equals one that was not."""
    assert_same_run(undisturbed, fleet.whole(tmp_path))


def test_a_stopped_run_resumes_to_the_same_bits(fleet: Fleet, undisturbed: Path, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    assert_same_run(undisturbed, fleet.whole(folder, "--resume", "auto"))


def test_a_stopped_run_resumes_on_fewer_processes(fleet: Fleet, stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "run")
    place = load_checkpoint(folder / "checkpoint.pth")
    with fleet.train(folder, "--resume", "auto", processes=fleet.fewer) as run:
        assert_ends(run, fleet)
    assert f"resuming at epoch 0, step {place['step']} of {STEPS}" in run.out
    assert [r["epoch"] for r in records(folder)] == [0, 1]
    # The update of each later step shows the same images and the same copies of them on either number of processes; on
    # fewer, in several batches per process, which its loader counts as steps.
    parts = fleet.size // fleet.fewer
    for step in range(place["step"], STEPS):
        before = shown(fleet, fleet.size, [step])
        after = shown(fleet, fleet.fewer, range(step * parts, (step + 1) * parts))
        assert before == after
        assert len(set(after)) == fleet.images


def shown(fleet: Fleet, world: int, steps: Iterable[int]) -> list[tuple[int, int]]:
    """(position, image) of everything that `world` processes show in these steps of the first epoch, in order."""
    orders = [Order(STEPS * fleet.images + 3, fleet.batch, world, rank, repeats=3) for rank in range(world)]
    found = [order.step(0, step) for order in orders for step in steps]
    positions, ids = (np.concatenate(part).tolist() for part in zip(*found, strict=True))
    return sorted(zip(positions, ids, strict=True))


@ON_GPUS
def test_a_run_resumed_on_fewer_gpus_trains_the_same(fleet: Fleet, still: Path, tmp_path: Path) -> None:
    with fleet.paced(tmp_path, *STILL) as run:
        stop(run, lambda: run.process.send_signal(signal.SIGTERM))
    assert_saved_in_mid_epoch(tmp_path)
    fleet.whole(tmp_path, *STILL, "--resume", "auto", processes=fleet.fewer)
    assert_nearly_same_losses(still, tmp_path, 1e-2)


@ON_GPUS
@pytest.mark.parametrize(("precision", "bound"), [((), 1e-2), (("--no_amp",), 1e-3)], ids=["bf16", "fp32"])
def test_one_gpu_trains_what_all_do(
    fleet: Fleet, still: Path, tmp_path: Path, precision: tuple[str, ...], bound: float
) -> None:
    """With one batch as large as all of theirs together, only the order of sums differs."""
    theirs = fleet.whole(tmp_path / "all", *STILL, *precision) if precision else still
    flags = (*STILL, *precision, "--batch-size", str(fleet.images))
    assert_nearly_same_losses(theirs, fleet.whole(tmp_path / "one", *flags, processes=1), bound)


def to_torchrun_and_workers(run: Watched) -> None:
    for pid in run.processes():
        os.kill(pid, signal.SIGTERM)


def to_torchrun_twice(run: Watched) -> None:
    run.process.send_signal(signal.SIGTERM)
    time.sleep(0.03)
    run.process.send_signal(signal.SIGTERM)


def to_workers_twice(run: Watched) -> None:
    for pause in (0.03, 0.0):
        for pid in run.workers().values():
            os.kill(pid, signal.SIGTERM)
        time.sleep(pause)


def usr1_to_workers(run: Watched) -> None:
    for pid in run.workers().values():
        os.kill(pid, signal.SIGUSR1)


@ON_GPUS
@pytest.mark.parametrize("how", [to_torchrun_and_workers, to_torchrun_twice, to_workers_twice, usr1_to_workers])
def test_a_signal_saves_the_place(fleet: Fleet, tmp_path: Path, how: Callable[[Watched], None]) -> None:
    with fleet.paced(tmp_path) as run:
        stop(run, lambda: how(run))
    assert_saved_in_mid_epoch(tmp_path)


def test_a_corrupt_image_stops_the_run_and_the_place_is_saved(fleet: Fleet, tmp_path: Path) -> None:
    own = replace(fleet, tree=shutil.copytree(fleet.tree, tmp_path / "tree"))
    order = Order(STEPS * fleet.images + 3, fleet.batch, fleet.size, 1, repeats=3, node=fleet.size)
    source = open_source(own.tree, "train")
    image = Path(source.name(int(order.decoded(0, STEPS - 1)[1][0])))
    sound = image.read_bytes()
    image.write_bytes(sound[:200])
    with own.train(tmp_path / "run", "--readahead", "1", "--prefetch", "1") as run:
        assert run.wait(TIMEOUT) != 0
        assert not run.gone_within(30)
    sentence = f"error: {image} is not a readable image"
    assert sentence in run.text
    assert re.search(rf"^rank \d: {re.escape(str(image))} is not .*: finishing the step", run.text, re.M), run.text
    state = load_checkpoint(tmp_path / "run" / "checkpoint.pth")
    assert state["epoch"] == 0 < state["step"]
    image.write_bytes(sound)
    own.whole(tmp_path / "run", "--resume", "auto")
    assert [r["epoch"] for r in records(tmp_path / "run")] == [0, 1]


@ON_GPUS
def test_a_lost_process_ends_the_run_and_is_named(fleet: Fleet, undisturbed: Path, tmp_path: Path) -> None:
    with fleet.paced(tmp_path, "--save-every", "2") as run:
        run.wait_for(r"epoch 0 \[3/", TIMEOUT)
        workers = run.workers()
        assert sorted(workers) == list(range(fleet.size))
        os.kill(workers[1], signal.SIGKILL)
        left = run.gone_within(LOST_WITHIN)
        assert not left, {pid: env.get("RANK", "torchrun") for pid, env in left.items()}
        assert run.wait(TIMEOUT) != 0
    assert f"error: rank 1 (pid {workers[1]} on " in run.text, run.text
    assert_saved_in_mid_epoch(tmp_path)
    assert_same_run(undisturbed, fleet.whole(tmp_path, "--resume", "auto"))
