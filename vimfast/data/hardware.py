"""Settings that find themselves: decoding threads, the decoder, and the JPEG engine's share of the work."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from vimfast.errors import UserError, did_you_mean

DECODERS = ("auto", "hardware", "cuda", "cpu")

# Pictures a second that a GPU's JPEG engines decode (ImageNet's originals, 110 KB), by compute capability. For the H200
# this follows from its fastest mixture (docs/benchmarks.md); the A100 has fewer engines, Blackwell's are taken to be as
# many: neither was measured. All others (GeForce RTX, A10, L4, L40: 8.6, 8.9, 12.0) have none. A share that is off
# costs speed and nothing else.
_ENGINES = {(8, 0): 8_000, (9, 0): 17_000, (10, 0): 17_000, (10, 3): 17_000}
_THREAD = 700  # what one core adds, decoding together with the GPU's ordinary cores
_LARGEST_SHARE = 0.9

# On an H200, 16 threads were slower than 8, beside its engine (17,802 against 22,238 pictures a second).
_MOST_GPU_THREADS = 8

_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads(on_gpu: bool = False) -> int:
    """Decoding threads of this process: the cores it may use, shared with the others that torchrun started here.

    Where each process was given cores of its own (``numactl``, ``taskset``), they are not shared out again.
    """
    mine = os.sched_getaffinity(0)
    cores = min(len(mine), _quota())
    if not _pinned(mine):
        cores //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    return max(1, min(cores, _MOST_GPU_THREADS) if on_gpu else cores)


def _pinned(mine: set[int]) -> bool:
    """Whether this process may use fewer cores than torchrun, which started it."""
    try:
        return "LOCAL_WORLD_SIZE" in os.environ and mine < os.sched_getaffinity(os.getppid())
    except OSError:
        return False


def _quota() -> int:
    """The cores' time that a container may use, which the set of its cores does not tell."""
    try:
        limit, period = _QUOTA.read_text().split()
        return max(1, round(int(limit) / int(period)))
    except (OSError, ValueError):  # none, or "max"
        return 1 << 20


def choose_decoder(wanted: str, device: torch.device) -> str:
    """``"hardware"``, ``"cuda"`` or ``"cpu"`` for what was asked for: ``"auto"``, or one of them.

    A GPU beats the same number of cores with and without a JPEG engine; the CPU decodes only where there is no GPU or
    where that is asked for, which leaves more of the GPU's memory and time to the model.

    Raises:
        UserError: no such decoder, or not on this device.
    """
    if wanted not in DECODERS:
        raise UserError(f"decoder is {wanted!r}{did_you_mean(wanted, DECODERS)}; want one of {', '.join(DECODERS)}")
    if device.type != "cuda":
        if wanted in ("hardware", "cuda"):
            raise UserError(f"--decoder {wanted} needs a GPU, and this run is on {device.type}; use --decoder auto")
        return "cpu"
    if wanted != "auto":
        return wanted
    return "hardware" if torch.cuda.get_device_capability(device) in _ENGINES else "cuda"


def engine_share(device: torch.device, threads: int) -> float:
    """The share of the pictures for the JPEG engine, so that it and the threads end together."""
    engine = _ENGINES.get(torch.cuda.get_device_capability(device), 0)
    return min(engine / (engine + _THREAD * threads), _LARGEST_SHARE)
