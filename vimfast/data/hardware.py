"""Settings chosen for the machine: the decoder, its threads, and the JPEG engine's share of the work."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import NamedTuple, get_args

import torch

from vimfast.config.choices import Decoder
from vimfast.errors import UserError, did_you_mean
from vimfast.limits import cpu_quota

DECODERS = get_args(Decoder)

# Images per second that a GPU's JPEG engines decode (ImageNet's originals, 110 KB), by compute capability. For the H200
# this follows from its fastest mixture (docs/benchmarks.md); the A100 has fewer engines, Blackwell's are taken to be as
# many: neither was measured. All others (GeForce RTX, A10, L4, L40: 8.6, 8.9, 12.0) have none. A share that is off
# costs speed and nothing else.
_ENGINES = {(8, 0): 8_000, (9, 0): 17_000, (10, 0): 17_000, (10, 3): 17_000}
_THREAD = 700  # what one core adds, decoding together with the GPU's ordinary cores
_LARGEST_SHARE = 0.9

# Threads that still helped on an H200 with 16 cores: beside its engine 16 were slower than 8 (17,802 against 22,238
# images per second), beside a training step 12 to 14 ordinary decoding threads slower than 11.
_MOST_THREADS = {"hardware": 8, "cuda": 11}
_OWN_CORES = 2  # left to the threads that launch the step and that read ahead, where the others decode on the CPU

# A core decodes 584 originals (110 KB) a second on the CPU beside others, or 1,772 images of short side 256 (30 KB),
# where one crop is wanted; 390 originals where several crops together cover nearly all of an image.
_IMAGE_SECONDS, _BYTE_SECONDS = 0.14e-3, 14.2e-9
_WHOLE = 1.45
# An unknown model's step is taken for a Vim-Tiny's on an H200 (22.9 ms for 128 images), on GPUs without an engine for
# one of twice that; and how much faster decoding must be, so that no step waits.
_UNKNOWN_STEP, _WITHOUT_ENGINE, _ROOM = 22.9e-3 / 128, 2, 1.2
_FEW_THREADS = 6  # fewer than these leave the JPEG engine most of the work in training too, where it has most to do

# Images of several steps are decoded together. A GPU's decoders wait about a step's time for each batch, whatever is in
# it; on the CPU, threads idle at the end of a batch until its largest image is done.
_STEPS_AT_ONCE = 4
_MOST_AT_ONCE = 512  # images


class Decoding(NamedTuple):
    """Who decodes."""

    decoder: str  # "hardware", "cuda" or "cpu"
    threads: int  # on the CPU, whoever decodes
    engine_share: float  # of the images, for the JPEG engine
    steps_at_once: int = 1  # whose images are decoded together


class Demand(NamedTuple):
    """What training asks of the decoder."""

    images: int  # to decode for a step
    crops: int  # that it trains on; more than images where several are cut from one
    seconds: float | None  # that it takes the GPU; None: unknown
    image_bytes: Callable[[], float]  # the mean size of an encoded image, called only where it matters


def choose_decoding(wanted: str, threads: int | None, device: torch.device, demand: Demand | None) -> Decoding:
    """The decoder, its threads and the JPEG engine's share, for what was asked for: a decoder, or ``"auto"``.

    Beside a training step the GPU is the wrong place to decode: its decoders launch kernels image by image, wait
    for each, and each waits until one of the step's leaves room. So where the cores are enough, they decode; else the
    GPU's ordinary cores help, and its JPEG engine where there are hardly any threads. In evaluation the fastest
    decoder wins: the engine, or the ordinary cores where there is none. docs/benchmarks.md has the figures.

    Args:
        threads: None for as many as help.
        demand: of training; None in evaluation.

    Raises:
        UserError: no such decoder, or not on this device.
    """
    if wanted not in DECODERS:
        hint = did_you_mean(wanted, DECODERS)
        raise UserError(f"decoder is {wanted!r}{hint}", f"it must be one of {', '.join(DECODERS)}")
    cores = available_cores()
    if device.type != "cuda":
        if wanted in ("hardware", "cuda"):
            raise UserError(f"--decoder {wanted} needs a GPU, and this run is on {device.type}; use --decoder auto")
        return Decoding("cpu", threads or cores, 0.0)
    engine = engine_rate(device)
    decoder = wanted
    if wanted == "auto":
        own = threads or cores - _OWN_CORES
        if demand is not None and _keeps_up(own, demand, engine > 0):
            decoder = "cpu"
        else:
            by_engine = demand is None or (own < _FEW_THREADS and demand.images == demand.crops)
            decoder = "hardware" if engine and by_engine else "cuda"
    if threads is None:
        threads = min(cores, _MOST_THREADS[decoder]) if decoder in _MOST_THREADS else max(1, cores - _OWN_CORES)
    share = min(engine / (engine + _THREAD * threads), _LARGEST_SHARE) if decoder == "hardware" else 0.0
    at_once = 1 if demand is None else min(_STEPS_AT_ONCE, max(1, _MOST_AT_ONCE // demand.images))
    return Decoding(decoder, threads, share, at_once)


def next_decoder(decoder: str, device: torch.device) -> str | None:
    """What to try where `decoder` turned out too slow: more of the GPU's help; None where there is no more."""
    if device.type != "cuda":
        return None
    return {"cpu": "cuda", "cuda": "hardware" if engine_rate(device) else None}.get(decoder)


def engine_rate(device: torch.device) -> int:
    """Images a second that the JPEG engine of a GPU decodes; 0: it has none."""
    return _ENGINES.get(torch.cuda.get_device_capability(device), 0)


def _keeps_up(threads: int, demand: Demand, engine: bool) -> bool:
    """Whether so many threads decode on the CPU as fast as the GPU trains."""
    each = _IMAGE_SECONDS + _BYTE_SECONDS * demand.image_bytes()
    if demand.images < demand.crops:
        each *= _WHOLE
    step = demand.seconds or _UNKNOWN_STEP * demand.crops * (1 if engine else _WITHOUT_ENGINE)
    return threads / each >= _ROOM * demand.images / step


def available_cores() -> int:
    """The cores this process may use, shared with the others that torchrun started here; at least 1.

    Where each process has cores of its own (:mod:`vimfast.affinity`, ``numactl``, ``taskset``), they are not shared out
    again; a container's share of their time is.
    """
    mine, ranks, quota = os.sched_getaffinity(0), int(os.environ.get("LOCAL_WORLD_SIZE", 1)), cpu_quota()
    own = len(mine) // (1 if _pinned(mine) else ranks)
    return max(1, own if quota is None else min(own, round(quota) // ranks))


def _pinned(mine: set[int]) -> bool:
    """Whether this process may use fewer cores than torchrun, which started it."""
    try:
        return "LOCAL_WORLD_SIZE" in os.environ and mine < os.sched_getaffinity(os.getppid())
    except OSError:
        return False
