"""How kernels are launched on different GPUs: the choices, and the file that stores them.

A choice is the shape of a program; it changes no result beyond the order of a sum. The first of CHOICES is the fastest
on an H200. For another GPU, :mod:`vimfast_kernels.tune` times all of them once and saves the fastest; a process reads
that file when it first launches a kernel, and does not change its choices afterwards.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vimfast_kernels.cache import cache_folder


class ScanForward(NamedTuple):
    """Of a program where the GPU has many to run, at state size 16."""

    channels: int
    lanes: int  # threads a channel
    unroll: int  # steps at once
    registers: int  # that a thread may have


class ScanBackward(NamedTuple):
    """Of a program at state size 16; a warp has 32 channels."""

    warps: int
    unroll: int
    registers: int | None  # None: as many as the compiler likes


class ConvForward(NamedTuple):
    channels: int
    steps: int  # outputs made from one window of rows held in registers
    warps: int


class ConvBackward(NamedTuple):
    channels: int  # of a program of one warp
    steps: int  # from one window of rows
    segments: int  # programs that share a sequence


class Norm(NamedTuple):
    entries: int  # per program and iteration
    warps: int
    programs: int  # of the backward pass, per multiprocessor: each leaves one row of partial sums


class Products(NamedTuple):
    """A weight's gradient is split over the rows into several products, to fill the GPU, whose results are summed.

    A program's share of the rows takes a time that falls as 1 / parts, and what the products leave takes one that grows
    as parts * entries. The sum of both is smallest at a number of parts that is inverse to the square root of entries.
    """

    side: int  # parts times the side of a square weight
    most: int  # parts


@dataclass(frozen=True)
class Tuning:
    """One choice for each kernel."""

    scan_forward: ScanForward
    scan_forward_fp32: ScanForward
    scan_backward: ScanBackward  # bf16, sums over channels as products with bf16 states
    scan_backward_fp32: ScanBackward  # all else
    conv_forward: ConvForward
    conv_backward: ConvBackward
    norm: Norm
    products: Products
    products_fp32: Products


CHOICES: dict[str, tuple[Any, ...]] = {
    # 168 registers let 6 programs of 2 warps reside on a multiprocessor, which on an H200 does batch 128 in one wave.
    "scan_forward": tuple(
        ScanForward(*v) for v in ((64, 1, 4, 168), (64, 1, 2, 128), (32, 1, 4, 168), (32, 1, 4, 128), (32, 2, 4, 128))
    ),
    "scan_forward_fp32": tuple(
        ScanForward(*v) for v in ((32, 1, 4, 168), (64, 1, 4, 168), (64, 1, 2, 168), (32, 1, 4, 255), (32, 2, 4, 128))
    ),
    # 168 let 12 warps reside. Shared memory, of which GeForce cards have half as much, allows them 6 anyway.
    "scan_backward": tuple(ScanBackward(*v) for v in ((2, 2, 168), (2, 4, 168), (1, 2, 168), (1, 2, 255), (4, 2, 168))),
    "scan_backward_fp32": tuple(ScanBackward(*v) for v in ((2, 4, None), (1, 4, None), (2, 4, 168), (1, 4, 168))),
    "conv_forward": tuple(ConvForward(*v) for v in ((128, 8, 2), (64, 16, 1), (64, 8, 1), (128, 8, 1))),
    "conv_backward": tuple(ConvBackward(*v) for v in ((64, 8, 2), (64, 8, 1), (64, 8, 4), (32, 8, 2))),
    "norm": tuple(Norm(*v) for v in ((1024, 2, 8), (512, 2, 16), (1024, 4, 8), (2048, 4, 8))),
    "products": tuple(Products(*v) for v in ((3200, 16), (3200, 8), (1600, 8), (6400, 16), (12800, 32))),
    "products_fp32": tuple(Products(*v) for v in ((12800, 32), (3200, 8), (6400, 16))),
}
DEFAULT = Tuning(**{name: choices[0] for name, choices in CHOICES.items()})
MEASURED = ((9, 0),)  # compute capabilities whose choices come first


def cache_file(device: int) -> Path:
    """Where this GPU's choices are saved: one file for each GPU, torch, Triton and text of the kernels."""
    import triton

    name = re.sub(r"\W+", "-", torch.cuda.get_device_name(device))
    versions = f"torch-{torch.__version__.split('+')[0]}-triton-{triton.__version__}"
    return cache_folder() / f"kernels-{name}-{versions}-{kernels_name()}.json"


@functools.cache
def kernels_name() -> str:
    """A short name for the text of all device functions, in whatever module they are."""
    package = Path(__file__).parent
    modules = [package / "device.py", package / "sums.py", *package.glob("*/device*.py")]
    functions = sorted(text for path in modules for text in _device_functions(path.read_text()))
    return hashlib.sha256("\0".join(functions).encode()).hexdigest()[:10]


def _device_functions(module: str) -> Iterator[str]:
    """The text of each decorated function of a module of device code."""
    lines = module.splitlines()
    for node in ast.parse(module).body:
        if isinstance(node, ast.FunctionDef) and node.decorator_list:
            yield "\n".join(lines[node.decorator_list[0].lineno - 1 : node.end_lineno])


def save(tuning: Tuning, path: Path) -> None:
    """Write to a temporary file, then rename: a concurrent reader finds the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{os.getpid()}")
    aside.write_text(json.dumps({name: value._asdict() for name, value in _items(tuning)}, indent=1) + "\n")
    aside.replace(path)


def load(path: Path) -> Tuning | None:
    """The choices in a file that :func:`save` wrote; None if it is missing or holds anything else."""
    try:
        written = json.loads(path.read_text())
        found = {name: next(c for c in CHOICES[name] if c._asdict() == value) for name, value in written.items()}
        return Tuning(**found)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, StopIteration):
        return None


def saved(device: int) -> Tuning | None:
    """The choices saved for this GPU and these kernels."""
    return load(cache_file(device))


def is_tuned(device: int) -> bool:
    """Whether the choices for this GPU were measured rather than guessed from another's."""
    return torch.cuda.get_device_capability(device) in MEASURED or saved(device) is not None


_chosen: dict[int, Tuning] = {}


def tuning_of(device: torch.device) -> Tuning:
    """The choices for the GPU that a tensor is on, read from disk once per process."""
    if device.type != "cuda":  # Triton's interpreter
        return DEFAULT
    index = torch.cuda.current_device() if device.index is None else device.index
    if index not in _chosen:
        _chosen[index] = saved(index) or DEFAULT
    return _chosen[index]


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; a few for the CPU, where Triton's interpreter runs."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@functools.cache
def shared_memory(device: torch.device) -> int:
    """Bytes of a multiprocessor, of which its programs have a share each."""
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def use(device: int, tuning: Tuning) -> None:
    """Launch with these choices from now on, in this process."""
    _chosen[device] = tuning


def read_again() -> None:
    """Read the files again: another process may have written one."""
    _chosen.clear()


def _items(tuning: Tuning) -> list[tuple[str, Any]]:
    return [(field.name, getattr(tuning, field.name)) for field in dataclasses.fields(tuning)]
