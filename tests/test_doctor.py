"""``vimfast doctor`` on this machine, and on what is broken in it."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_image
from runs import ROOT, call

from vimfast.data.files import FilesSource
from vimfast.data.source import BadImage
from vimfast.doctor import backends, isolation, machine
from vimfast.doctor.gpus import _describe, look_at_dali, look_at_gpus
from vimfast.doctor.isolation import Failed, NoAnswer, isolated
from vimfast.doctor.machine import look_at_shared_memory
from vimfast.doctor.results import Driver, Gpu, Torch, Usable
from vimfast.doctor.software import REQUIRED, _fits, look_at_packages
from vimfast.doctor.storage import look_at_data
from vimfast.shards.convert import convert
from vimfast.shards.format import ConversionOptions


def find(report: dict[str, Any], what: str) -> dict[str, Any]:
    (line,) = [line for line in report["lines"] if line["what"] == what]
    return line


def states(report: dict[str, Any], state: str) -> list[str]:
    return [line["what"] for line in report["lines"] if line["state"] == state]


@pytest.mark.slow
def test_this_machine(tree: Path) -> None:
    done = call("vimfast", "doctor", str(tree), "--json", ok=False)
    report = json.loads(done.stdout)
    assert states(report, "red") == []
    assert done.returncode == 0
    assert find(report, "torch")["figures"]["version"] == torch.__version__
    assert find(report, "speed")["figures"]["images"] == 36
    assert find(report, "speed")["found"].startswith(f"{tree} (folder of images): ")
    assert find(report, "DALI")["figures"]["decoders"][0] == "cpu"
    errors = find(report, "reference")["figures"]["fp32"]
    assert 0 < errors["outputs"] < 1e-5
    assert 0 < errors["gradients"] < 1e-4
    assert find(report, "cores")["figures"]["allowed"] == len(os.sched_getaffinity(0))
    for line in report["lines"]:
        assert line["fix"] or line["state"] == "green"
    if not torch.cuda.is_available():
        assert find(report, "driver")["state"] == "yellow"
        assert find(report, "gluon")["found"] == "not on this machine: needs a CUDA GPU and there is none here"


def write_module(folder: Path, name: str, text: str) -> None:
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(text)


@pytest.mark.slow
def test_broken_packages_are_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that vimfast can do without are yellow. They raise, crash and exit when they are imported."""
    write_module(tmp_path, "timm", "raise ImportError('no timm')")  # so that no model is tried, which takes long
    write_module(tmp_path, "mamba_ssm", "raise OSError('libcudart.so.11.0: cannot open shared object file')")
    write_module(tmp_path, "causal_conv1d", "import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    write_module(tmp_path, "tensorboard", "raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "400")
    done = call("vimfast", "doctor", ok=False, fresh=True)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()

    def at(what: str) -> int:
        return next(i for i, line in enumerate(lines) if re.match(rf". +{what} ", line))

    assert lines[at("mamba_ssm")].startswith("!")
    assert "(OSError: libcudart.so.11.0: cannot open shared object file)" in lines[at("mamba_ssm")]
    assert "-> pip install --force-reinstall --no-deps --no-build-isolation mamba-ssm" in lines[at("mamba_ssm") + 1]
    assert "(crashed (SIGSEGV))" in lines[at("causal_conv1d")]
    assert lines[at("tensorboard")].startswith("✗")
    assert "(SystemExit: 3)" in lines[at("tensorboard")]
    assert re.fullmatch(r"not fit to train on: 6 red, \d yellow", lines[-1]), done.stdout


def test_without_torch_and_rich_it_still_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_module(tmp_path, "torch", "raise ImportError('libtorch_cuda.so: undefined symbol')")
    write_module(tmp_path, "rich", "raise ImportError('no rich')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    done = call("vimfast", "doctor", str(tmp_path), ok=False, fresh=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "x torch: cannot be imported (ImportError: libtorch_cuda.so: undefined symbol) -> pip install" in done.stdout
    assert "x rich: cannot be imported (ImportError: no rich)" in done.stdout
    assert f"x speed: {tmp_path} has no train/ -> {tmp_path} must hold train/" in done.stdout
    assert "+ cores: " in done.stdout


def fail() -> None:
    raise ValueError("first line\nsecond line")


def leave_a_process() -> int:
    return subprocess.Popen(["sleep", "600"], close_fds=False).pid


def crash() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize(
    ("function", "why"),
    [
        (fail, "ValueError: first line"),
        (crash, r"crashed \(SIGKILL\)"),
        (partial(os._exit, 0), "ended without an answer"),
        (partial(time.sleep, 60), "no answer within 1 s"),
        (partial(sys.exit, "no licence"), "SystemExit: no licence"),
    ],
)
def test_what_fails_apart_is_a_sentence(function: Callable[[], Any], why: str) -> None:
    begin = time.monotonic()
    with pytest.raises(Failed, match=f"^{why}$"):
        isolated(function, 1)
    assert time.monotonic() - begin < 10


def test_time_without_a_core_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine torch was said to be broken, as its import took more than a minute."""
    monkeypatch.setattr(isolation, "_waited", lambda process: 60.0)
    assert isolated(partial(time.sleep, 2.2), 2) is None
    with pytest.raises(NoAnswer, match=r"no answer within 0 s"):  # it computes and never ends
        isolated(partial(time.sleep, 600), 0.1)


@pytest.mark.parametrize(("text", "seconds"), [("2000000000 60500000000 7\n", 60.5), ("", 0.0), (None, 0.0)])
def test_time_without_a_core_is_what_the_system_says(
    text: str | None, seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels without it have no such file, or an empty one."""
    if text is not None:
        (tmp_path / "schedstat").write_text(text)
    monkeypatch.setattr(isolation, "Path", lambda path: tmp_path / Path(path).name)
    assert isolation._waited(1) == seconds


def test_what_a_package_prints_when_it_is_imported_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """--json would not be JSON."""
    write_module(tmp_path, "loud", "import sys\nprint('welcome')\nprint('deprecated', file=sys.stderr)")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("vimfast.doctor.software.REQUIRED", (("loud", "loud", "1"),))
    (line,) = look_at_packages()
    assert (line.state, "loud" in sys.modules) == ("green", True)
    assert capsys.readouterr() == ("", "")


class Clock:
    """/proc/stat of three cores, the first two of which this process may use, with 100 ticks of each between two looks;
    `quota` of a container."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, quota: float | None = None) -> None:
        self.stat, self.idle, self.first = folder / "stat", 0, 0
        self._write(0)
        monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1})
        monkeypatch.setattr("vimfast.doctor.machine.cpu_quota", lambda: quota)
        monkeypatch.setattr("vimfast.doctor.machine.time.sleep", lambda seconds: self._write(self.ticks))

    ticks = 100

    def _write(self, ticks: int) -> None:
        """Of which so many percent are idle or wait for a disk; the rest is a guest's, which is counted twice."""
        idle = ticks * self.idle // 100
        disk, busy = min(idle, 5), ticks - idle
        core = f" {100 + busy} 0 0 {200 + idle - disk} {300 + disk} 0 0 0 {50 + busy} 0\n"
        cores = "".join(f"cpu{number}{core}" for number in range(self.first, self.first + 2))
        self.stat.write_text(f"cpu 1 2 3\n{cores}cpu9 100 0 0 {200 + ticks} 300 0 0 0 0 0\nintr 1\n")


@pytest.mark.parametrize(
    ("idle", "quota", "state", "threads", "found"),
    [
        (10, None, "yellow", 1, "0.2 of 2 cores idle: everything takes longer, and Vim-Tiny is tried on 1 thread"),
        (60, None, "green", None, "1.2 of 2 cores idle"),
        (60, 1.5, "green", None, "1.2 of 1.5 cores idle"),
        (100, 0.5, "green", None, "0.5 of 0.5 cores idle"),
    ],
)
def test_a_busy_machine_is_said_to_be(
    idle: int,
    quota: float | None,
    state: str,
    threads: int | None,
    found: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Threads of Vim-Tiny, which wait for each other, took longer than their five minutes there."""
    clock = Clock(tmp_path, monkeypatch, quota)
    clock.idle = idle
    cores = machine.idle_cores(clock.stat)
    line = machine.look_at_load(cores)
    assert (line.state, line.found, machine.threads_for(cores)) == (state, found, threads)


def test_a_machine_that_does_not_say_how_busy_it_is_is_not_busy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No file; in some containers no time passes there, or the cores have other numbers than those of this process."""
    assert machine.idle_cores(tmp_path / "none") is None
    still = Clock(tmp_path, monkeypatch)
    still.ticks = 0
    assert machine.idle_cores(still.stat) is None
    renumbered = Clock(tmp_path, monkeypatch)
    renumbered.first = 4
    assert machine.idle_cores(renumbered.stat) is None
    line = machine.look_at_load(None)
    assert (line.state, machine.threads_for(None)) == ("green", None)


def test_a_backend_that_does_not_answer_may_only_be_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "_SECONDS", 0.05)  # less than a model takes to be built
    line = backends._look("reference", "cpu", Usable())
    assert line.state == "red"
    assert "no answer" in line.found
    assert line.fix.startswith("if other work keeps this machine busy, try again without it")


def test_what_is_called_apart_answers_and_leaves_nothing() -> None:
    assert isolated(lambda: b"x" * 5_000_000, 60) == b"x" * 5_000_000
    begin = time.monotonic()
    left = isolated(leave_a_process, 60)
    assert time.monotonic() - begin < 30  # it holds the pipe open, and was not waited for
    until = time.monotonic() + 10
    while Path(f"/proc/{left}/stat").exists() and time.monotonic() < until:
        if Path(f"/proc/{left}/stat").read_text().rpartition(") ")[2][0] == "Z":
            break
        time.sleep(0.01)
    else:
        assert not Path(f"/proc/{left}").exists()


def test_speed_of_shards_of_folders_and_of_what_is_neither(tree: Path, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    convert(tree, shards, ConversionOptions(), workers=1)
    size = sum(path.stat().st_size for path in (tree / "train").rglob("*.JPEG"))
    for data, kind in ((tree, "folder of images"), (shards, "shards")):
        line = look_at_data(data, 0)
        assert (line.figures["kind"], line.figures["images"], line.figures["bytes"]) == (kind, 36, size)
        assert line.figures["mb_s"] == pytest.approx(line.figures["images_s"] * size / 36 / 1e6)
    assert look_at_data(shards, 10_000_000).state == "yellow"
    assert "vimfast prepare DATA --out shards/" in look_at_data(tree, 10_000_000).fix
    for path, problem in ((tmp_path / "none", "does not exist"), (tree / "train", "has no train/")):
        line = look_at_data(path, 0)
        assert (line.state, problem in line.found) == ("red", True)
    (shards / "train-000000.tar").unlink()
    assert "train-000000.tar is missing" in look_at_data(shards, 0).found


def test_speed_of_a_folder_with_bad_images(tmp_path: Path) -> None:
    write_image(tmp_path / "train" / "a" / "deep" / "one.jpg", 1)
    (tmp_path / "train" / "a" / "two.jpg").write_bytes(b"no image")
    line = look_at_data(tmp_path, 0)
    assert (line.state, line.figures["images"]) == ("yellow", 1)
    assert "two.jpg is not a readable image" in line.found
    (tmp_path / "train" / "a" / "deep" / "one.jpg").unlink()
    line = look_at_data(tmp_path, 0)
    assert (line.state, "none of 1 image could be read" in line.found) == ("red", True)
    (tmp_path / "train" / "a" / "two.jpg").unlink()
    assert "holds no images in class folders" in look_at_data(tmp_path, 0).found


def test_any_files_are_a_source(tmp_path: Path) -> None:
    """One that is gone is as bad as one that is no image."""
    write_image(tmp_path / "a.png", 1, (30, 20))
    (tmp_path / "b.jpg").write_bytes(b"no image")
    source = FilesSource([tmp_path / "a.png", tmp_path / "b.jpg", tmp_path / "c.jpg"])
    assert source.read(np.array([0])).sizes.tolist() == [[20, 30]]
    for i, why in ((1, "b.jpg is not a readable image"), (2, "c.jpg cannot be read")):
        with pytest.raises(BadImage, match=why) as error:
            source.read(np.array([0, i]))
        assert error.value.image == i


DRIVER = Driver("580.82.07", (13, 0), 1)
H200 = Gpu("NVIDIA H200", (9, 0), 140 << 30, 139 << 30, True, "")


@pytest.mark.parametrize(
    ("driver", "cuda", "state", "found"),
    [
        (DRIVER._replace(cuda=(12, 4)), "13.0", "red", "too old for this torch, which is built for CUDA 13.0"),
        (DRIVER, None, "red", "this torch is built without CUDA"),
    ],
)
def test_a_driver_and_a_torch_that_do_not_fit(driver: Driver, cuda: str | None, state: str, found: str) -> None:
    (line,), usable = look_at_gpus(driver, Torch("2.9.0", cuda, None))
    assert (line.what, line.state, usable) == ("driver", state, Usable())
    assert found in line.found


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to see")
@pytest.mark.parametrize(("visible", "state"), [("", "yellow"), ("-1", "yellow"), ("7", "red"), (None, "red")])
def test_gpus_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch, visible: str | None, state: str) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    (driver, line), usable = look_at_gpus(DRIVER, Torch("2.9.0", "13.0", None))
    assert (driver.state, line.state, usable) == ("green", state, Usable())
    assert ("CUDA_VISIBLE_DEVICES" in line.fix) == (visible is not None)


@pytest.mark.parametrize(
    ("gpu", "state", "found"),
    [
        (H200, "green", "NVIDIA H200, compute capability 9.0, 139 of 140 GiB free, JPEG engine"),
        (H200._replace(free=20 << 30), "yellow", "20 of 140 GiB free"),
        (H200._replace(capability=(7, 5), engine=False), "yellow", "no JPEG engine; the fast kernels need 8.0"),
        (H200._replace(trouble="no kernel image"), "red", "does not compute (no kernel image)"),
    ],
)
def test_gpus_are_described(gpu: Gpu, state: str, found: str) -> None:
    line = _describe(0, gpu)
    assert line.state == state
    assert found in line.found


@pytest.mark.parametrize(
    ("installed", "found", "fix"),
    [
        ([], "not installed", "pip install 'vimfast[cuda12]'"),
        (["120", "130"], "they overwrite each other's files", "pip uninstall nvidia-dali-cuda120 nvidia-dali-cuda130"),
    ],
)
def test_the_dali_that_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: list[str], found: str, fix: str
) -> None:
    for cuda in installed:
        folder = tmp_path / f"nvidia_dali_cuda{cuda}-2.1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: nvidia-dali-cuda{cuda}\nVersion: 2.1.0\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    line = look_at_dali(DRIVER._replace(cuda=(12, 8)), Torch("2.9.0", "12.8", None), Usable())
    assert line.state == "red"
    assert found in line.found
    assert fix in line.fix


def test_shared_memory_matters_to_several_gpus(tmp_path: Path) -> None:
    assert look_at_shared_memory(0, tmp_path).state == "green"
    assert look_at_shared_memory(8, tmp_path / "none").state == "red"


def test_what_is_required_is_what_is_installed_with_vimfast() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", text, re.MULTILINE | re.DOTALL)
    assert listed is not None
    wanted = dict(re.findall(r'"([\w.-]+)>=([\d.]+)"', listed[1]))
    assert wanted.pop("torch") == "2.6"
    assert {package: oldest for _, package, oldest in REQUIRED} == wanted


@pytest.mark.parametrize(
    ("version", "wanted", "fits"),
    [
        ("3.9.0", "==3.9.0", True),
        ("3.9.1", "==3.9.0", False),
        ("3.9.1", "~=3.9.0", True),
        ("3.10.0", "~=3.9.0", False),
        ("3.9.0+git", "==3.9.0", True),
    ],
)
def test_the_triton_that_torch_goes_with(version: str, wanted: str, fits: bool) -> None:
    assert _fits(version, wanted) == fits
