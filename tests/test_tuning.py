"""Choices of program shapes: kept on disk, read back exactly, and never believed where they are anything else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import vimfast_kernels
from vimfast.data.cache import CacheSettings
from vimfast_kernels import tune, tuning
from vimfast_kernels.cache import cache_folder
from vimfast_kernels.tuning import CHOICES, DEFAULT, load, save, tuning_of

OTHER = replace(DEFAULT, **{name: choices[-1] for name, choices in CHOICES.items()})


@pytest.fixture
def a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What torch reports of a GPU that nobody has measured; the folder of its cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 9))
    monkeypatch.setattr(tuning, "_chosen", {})
    return tmp_path


def test_choices_come_back_as_they_were_written(tmp_path: Path) -> None:
    for kept in (DEFAULT, OTHER):
        save(kept, tmp_path / "new folder" / "kept.json")
        assert load(tmp_path / "new folder" / "kept.json") == kept
    assert [path.name for path in (tmp_path / "new folder").iterdir()] == ["kept.json"]


@pytest.mark.parametrize("damage", ["cut", "no object", "one less", "one more", "no choice", "a number"])
def test_a_file_that_holds_anything_else_is_no_tuning(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "kept.json"
    save(OTHER, path)
    written = json.loads(path.read_text())
    if damage == "one less":
        del written["norm"]
    if damage == "one more":
        written["normalization"] = written["norm"]
    if damage == "no choice":
        written["scan_forward"]["channels"] = 4096
    if damage == "a number":
        written["norm"] = 7
    path.write_text({"cut": path.read_text()[:40], "no object": "[]"}.get(damage, json.dumps(written)))
    assert load(path) is None


def test_a_gpu_is_tuned_once(a_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    runs = []
    monkeypatch.setattr(tune, "tune", lambda device, log: runs.append(device) or OTHER)
    gpu, said = torch.device("cuda", 0), list[str]()
    assert tuning_of(gpu) == DEFAULT
    for _ in range(2):
        tune.tune_once(0, said.append)
    assert runs == [0]
    assert "NVIDIA GeForce RTX 4090" in said[0]
    assert "ScanForward" in said[1]
    assert tuning_of(gpu) == DEFAULT  # not in the middle of a run
    tuning.read_again()
    assert tuning_of(gpu) == OTHER
    assert [path.parent.name for path in a_gpu.rglob("*.json")] == ["vimfast"]


def test_other_kernels_are_tuned_again(a_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    save(OTHER, tuning.cache_file(0))
    assert tuning.is_tuned(0)
    monkeypatch.setattr(tuning, "kernels_name", lambda: "changed")
    assert not tuning.is_tuned(0)


def test_kernels_are_named_after_device_code_alone() -> None:
    kernel = "@triton.jit\ndef f(x):\n    return x\n"
    assert list(tuning._device_functions(f"import triton\n\n\n{kernel}\n\ndef launch():\n    f(1)\n")) == [kernel[:-1]]


def test_a_cache_that_cannot_be_written_ends_nothing(a_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    (a_gpu / "vimfast").write_text("a file where the folder should be")
    monkeypatch.setattr(tune, "tune", lambda device, log: OTHER)
    with pytest.warns(UserWarning, match="XDG_CACHE_HOME to a writable folder"):
        tune.tune_once(0, lambda line: None)


@pytest.mark.parametrize("home", ["", "a/relative/one", "~/cache"])
def test_a_cache_folder_that_is_not_absolute_is_ignored(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", home)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert cache_folder() == Path("/home/somebody/.cache/vimfast")
    assert CacheSettings().path == Path("/home/somebody/.cache")
    assert CacheSettings("relative").path == Path("relative"), "a flag means what it says"


def test_without_torch_the_command_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')")
    path = os.pathsep.join([str(tmp_path), str(Path(vimfast_kernels.__file__).parents[1])])
    words = [sys.executable, "-m", "vimfast_kernels.tune"]
    done = subprocess.run(words, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "vimfast_kernels needs torch, which cannot be imported (No module named" in done.stderr
    assert "pip install torch" in done.stderr
    assert done.stderr.count("\n") == 1


def test_an_h200_was_measured_by_hand(a_gpu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    assert tuning.is_tuned(0)
