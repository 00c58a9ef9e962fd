"""Threads from the cores that are this process's own; decoders that the device has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vimfast.data import hardware
from vimfast.data.hardware import choose_decoder, default_threads, engine_share
from vimfast.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(hardware, "_QUOTA", tmp_path / "cpu.max")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path / "cpu.max"


def cores(monkeypatch: pytest.MonkeyPatch, mine: int, parents: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(parents if pid == os.getppid() else mine)))


def test_processes_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 12, 12)
    assert default_threads() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert default_threads() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_threads() == 1


def test_cores_given_to_one_process_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 6, 48)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert default_threads() == 6


@pytest.mark.parametrize(("quota", "threads"), [("400000 100000", 4), ("50000 100000", 1), ("max 100000", 12)])
def test_a_containers_share_of_time_counts(
    monkeypatch: pytest.MonkeyPatch, no_quota: Path, quota: str, threads: int
) -> None:
    cores(monkeypatch, 12, 12)
    no_quota.write_text(quota)
    assert default_threads() == threads


def test_a_gpu_is_not_given_more_threads_than_it_can_use(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 256, 256)
    assert default_threads(on_gpu=True) == 8
    assert default_threads() == 256


def test_decoders_that_are_not_there() -> None:
    assert choose_decoder("auto", CPU) == choose_decoder("cpu", CPU) == "cpu"
    with pytest.raises(UserError, match="'hardwear'; did you mean 'hardware'"):
        choose_decoder("hardwear", CPU)
    with pytest.raises(UserError, match="--decoder cuda needs a GPU, and this run is on cpu"):
        choose_decoder("cuda", CPU)


@pytest.mark.parametrize(
    ("capability", "decoder"),
    [
        ((8, 0), "hardware"),
        ((9, 0), "hardware"),
        ((10, 0), "hardware"),
        ((8, 6), "cuda"),
        ((8, 9), "cuda"),
        ((12, 0), "cuda"),
    ],
)
def test_the_decoder_that_a_gpu_has(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], decoder: str) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    device = torch.device("cuda", 0)
    assert choose_decoder("auto", device) == decoder
    assert choose_decoder("cpu", device) == "cpu"
    shares = [engine_share(device, threads) for threads in (1, 8, 16, 64)]
    assert all(0 < share < 1 for share in shares) if decoder == "hardware" else not any(shares)
    assert shares == sorted(shares, reverse=True)  # more threads leave less to the engine
