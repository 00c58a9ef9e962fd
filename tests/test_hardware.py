"""Threads from the cores that are this process's own; decoders that the device has."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from vimfast.data.hardware import Demand, available_cores, choose_decoding, next_decoder
from vimfast.errors import UserError

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_quota(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr("vimfast.limits.CGROUPS", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    return tmp_path / "cpu.max"


def cores(monkeypatch: pytest.MonkeyPatch, mine: int, parents: int) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(parents if pid == os.getppid() else mine)))


def test_processes_of_a_host_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 12, 12)
    assert available_cores() == 12
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    assert available_cores() == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert available_cores() == 1


def test_cores_given_to_one_process_are_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 6, 48)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert available_cores() == 6


@pytest.mark.parametrize(("quota", "threads"), [("400000 100000", 4), ("50000 100000", 1), ("max 100000", 12)])
def test_a_containers_share_of_time_counts(
    monkeypatch: pytest.MonkeyPatch, no_quota: Path, quota: str, threads: int
) -> None:
    cores(monkeypatch, 12, 12)
    no_quota.write_text(quota)
    assert available_cores() == threads


def test_decoders_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 12, 12)
    assert choose_decoding("auto", None, CPU, TINY) == ("cpu", 12, 0.0, 1)
    assert choose_decoding("cpu", 3, CPU, None) == ("cpu", 3, 0.0, 1)
    with pytest.raises(UserError, match="'hardwear'; did you mean 'hardware'"):
        choose_decoding("hardwear", None, CPU, TINY)
    with pytest.raises(UserError, match="--decoder cuda needs a GPU, and this run is on cpu"):
        choose_decoding("cuda", None, CPU, TINY)


ORIGINALS, SHORT_256 = 110e3, 30e3  # bytes
TINY = Demand(128, 128, None, lambda: ORIGINALS)  # an epoch's step of Vim-Tiny, one crop from each image
H200, A100, RTX_4090, RTX_3090 = (9, 0), (8, 0), (8, 9), (8, 6)


@pytest.mark.parametrize(
    ("capability", "cores_here", "image_bytes", "decoder", "threads"),
    [
        (H200, 16, ORIGINALS, "cpu", 14),
        (H200, 24, ORIGINALS, "cpu", 22),
        (H200, 12, ORIGINALS, "cuda", 11),
        (H200, 4, ORIGINALS, "hardware", 4),
        (H200, 16, None, "hardware", 8),
        (A100, 16, None, "hardware", 8),
        (RTX_4090, 16, ORIGINALS, "cpu", 14),
        (RTX_4090, 8, ORIGINALS, "cpu", 6),
        (RTX_4090, 4, ORIGINALS, "cuda", 4),
        (RTX_4090, 16, None, "cuda", 11),
        (RTX_3090, 1, ORIGINALS, "cuda", 1),
        (H200, 12, SHORT_256, "cpu", 10),
        (H200, 8, SHORT_256, "cpu", 6),
        (RTX_4090, 4, SHORT_256, "cpu", 2),
        (H200, 16, 500e3, "cuda", 11),
    ],
)
def test_who_decodes_follows_from_gpu_and_cores(
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    cores_here: int,
    image_bytes: float | None,
    decoder: str,
    threads: int,
) -> None:
    cores(monkeypatch, cores_here, cores_here)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    demand = None if image_bytes is None else Demand(128, 128, None, lambda: image_bytes)
    chosen = choose_decoding("auto", None, torch.device("cuda", 0), demand)
    assert (chosen.decoder, chosen.threads) == (decoder, threads)
    assert (chosen.engine_share > 0) == (decoder == "hardware")


def test_more_threads_leave_less_to_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: H200)
    gpu = torch.device("cuda", 0)
    shares = [choose_decoding("hardware", threads, gpu, TINY).engine_share for threads in (1, 8, 16, 64)]
    assert all(0 < share < 1 for share in shares)
    assert shares == sorted(shares, reverse=True)


def test_threads_asked_for_decide_who_decodes(monkeypatch: pytest.MonkeyPatch) -> None:
    cores(monkeypatch, 16, 16)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: H200)
    assert choose_decoding("auto", 8, torch.device("cuda", 0), TINY)[:2] == ("cuda", 8)


@pytest.mark.parametrize(
    ("cores_here", "demand", "decoder", "steps_at_once"),
    [
        (16, Demand(44, 128, 22.7e-3, lambda: ORIGINALS), "cpu", 4),  # Vim-Tiny, three crops from each
        (8, Demand(44, 128, 22.7e-3, lambda: ORIGINALS), "cpu", 4),
        (4, Demand(44, 128, 22.7e-3, lambda: ORIGINALS), "cuda", 4),
        (8, Demand(128, 128, 22.7e-3, lambda: ORIGINALS), "cuda", 4),
        (8, Demand(128, 128, 47.6e-3, lambda: ORIGINALS), "cpu", 4),  # Vim-Small
        (4, Demand(64, 64, None, lambda: ORIGINALS), "hardware", 4),
        (8, Demand(1000, 1000, 22.7e-3, lambda: ORIGINALS), "cuda", 1),
    ],
)
def test_the_models_own_step_decides(
    monkeypatch: pytest.MonkeyPatch, cores_here: int, demand: Demand, decoder: str, steps_at_once: int
) -> None:
    cores(monkeypatch, cores_here, cores_here)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: H200)
    chosen = choose_decoding("auto", None, torch.device("cuda", 0), demand)
    assert (chosen.decoder, chosen.steps_at_once) == (decoder, steps_at_once)


def test_what_to_try_where_training_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: H200)
    assert [next_decoder(now, gpu) for now in ("cpu", "cuda", "hardware")] == ["cuda", "hardware", None]
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: RTX_4090)
    assert [next_decoder(now, gpu) for now in ("cpu", "cuda")] == ["cuda", None]
    assert next_decoder("cpu", CPU) is None
