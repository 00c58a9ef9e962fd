"""Time every choice of :mod:`vimfast_kernels.tuning` on this GPU and keep the fastest.

    python -m vimfast_kernels.tune

Each kernel is timed on its own, with the shapes of a Vision Mamba of width 192 at 224 pixels and batch 128. The trainer
does this once for each GPU model that has not been measured, before its first step.
"""

from __future__ import annotations

import argparse
import functools
import math
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from vimfast_kernels import tuning
from vimfast_kernels.tuning import CHOICES, DEFAULT, Tuning

BATCH, LENGTH, CHANNELS, STATES, RANK = 128, 197, 384, 16, 16
GAIN = 0.98  # a choice must be this much faster than the best before it
REPEATS = 15

Log = Callable[[str], None]


def milliseconds(function: Callable[[], Any], flush: Tensor, repeats: int) -> float:
    """Median time of a CUDA graph's replay with a cold L2 cache: `flush`, which is larger, is overwritten first."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may use the GPU: NCCL's does
        function()
    times: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        flush.zero_()
        start.record()
        graph.replay()
        end.record()
        times.append((start, end))
    torch.cuda.synchronize()
    taken: list[float] = sorted(a.elapsed_time(b) for a, b in times)
    return taken[repeats // 2]


def kernels() -> dict[str, Callable[[], Any]]:
    """What is timed for each key of CHOICES."""
    from vimfast_kernels.conv import launch as conv
    from vimfast_kernels.norm import launch as norm
    from vimfast_kernels.product.launch import sum_of_products
    from vimfast_kernels.scan import launch as scan

    def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.randn(shape, device="cuda", dtype=dtype) / 8

    def scan_inputs(dtype: torch.dtype) -> scan.Inputs:
        rows = (2, BATCH, LENGTH)
        A = -torch.rand(2, CHANNELS, STATES, device="cuda") * 8
        D, bias = random(2, CHANNELS, dtype=torch.float32), random(2, CHANNELS, dtype=torch.float32) - 3
        u = random(*rows, CHANNELS, dtype=dtype)
        low, B, C = random(*rows, RANK + 2 * STATES, dtype=dtype).split([RANK, STATES, STATES], dim=-1)
        z = random(BATCH, LENGTH, CHANNELS, dtype=dtype)
        inputs = scan.Inputs(u, low, A, B, C, D, z, bias, both, 0.5, random(2, CHANNELS, RANK, dtype=dtype))
        return scan.projected(inputs)  # a product outside is the same for all choices

    def scan_forward(dtype: torch.dtype) -> Callable[[], Any]:
        inputs = scan_inputs(dtype)
        return lambda: scan.launch_forward(inputs, save=True)

    def scan_backward(dtype: torch.dtype) -> Callable[[], Any]:
        inputs = scan_inputs(dtype)
        _, y, states = scan.launch_forward(inputs, save=True)
        grad = random(BATCH, LENGTH, CHANNELS, dtype=dtype)
        dB, dC, dz, out = (torch.empty_like(x) for x in (inputs.B, inputs.C, grad, grad))
        return lambda: scan.launch_backward(grad, inputs, y, states, dB, dC, dz, out)

    def run_norm() -> None:
        norm.launch_forward(h, residual, options, normed, total)
        norm.launch_backward(h, residual, norm.Normalized(normed, rstd), options, dx_of_norm, total)

    def products(dtype: torch.dtype) -> Callable[[], Any]:
        rows = BATCH * LENGTH
        pairs = [
            (random(1, rows, 2 * CHANNELS, dtype=dtype), random(1, rows, CHANNELS // 2, dtype=dtype)),
            (random(2, rows, RANK + 2 * STATES, dtype=dtype), random(2, rows, CHANNELS, dtype=dtype)),
        ]
        return lambda: [sum_of_products(*pair) for pair in pairs]

    both = [False, True]
    x, dx = random(BATCH, LENGTH, 2 * CHANNELS)[..., :CHANNELS], random(BATCH, LENGTH, CHANNELS)
    dout, dense, tap_bias = random(2, BATCH, LENGTH, CHANNELS), random(2, CHANNELS, 4), random(2, CHANNELS)
    taps = dense.mT.contiguous().mT  # channels are neighbours, as within a block
    h, normed, dx_of_norm = (random(BATCH, LENGTH, CHANNELS // 2) for _ in range(3))
    residual, total = (random(*h.shape, dtype=torch.float32) for _ in range(2))
    rstd, weight = random(BATCH * LENGTH, dtype=torch.float32), random(CHANNELS // 2, dtype=torch.float32)
    options = norm.Norm(weight, None, None, 0.0, 1e-5, rms=True)
    return {
        "scan_forward": scan_forward(torch.bfloat16),
        "scan_forward_fp32": scan_forward(torch.float32),
        "scan_backward": scan_backward(torch.bfloat16),
        "scan_backward_fp32": scan_backward(torch.float32),
        "conv_forward": lambda: conv.launch_forward(x, taps, tap_bias, both),
        "conv_backward": lambda: conv.launch_backward(dout, x, dense, tap_bias, both, dx),
        "norm": run_norm,
        "products": products(torch.bfloat16),
        "products_fp32": products(torch.float32),
    }


def tune(device: int, log: Log) -> Tuning:
    """The fastest choice for each kernel on this GPU; this process uses it from now on.

    The first of CHOICES stays unless another is faster beyond the noise; a choice that the GPU or the compiler rejects
    is skipped.
    """
    best = DEFAULT
    with torch.cuda.device(device), torch.random.fork_rng([device]):  # tuning does not change a run's random numbers
        flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
        for name, run in kernels().items():
            fastest = math.inf
            for choice in CHOICES[name]:
                tuning.use(device, replace(best, **{name: choice}))
                try:
                    taken = milliseconds(run, flush, REPEATS)
                except Exception as error:  # shared memory, registers, the compiler's own: many types
                    log(f"{name} {choice}: {type(error).__name__}")
                    continue
                log(f"{name} {choice}: {taken:.4f} ms")
                if taken < GAIN * fastest:
                    best, fastest = replace(best, **{name: choice}), taken
    tuning.use(device, best)
    torch.cuda.empty_cache()
    return best


def tune_once(device: int, log: Log, step: Log | None = None) -> None:
    """Tune and save the result, unless this GPU model was measured before.

    Args:
        log: called with the two lines that a user of the trainer should see.
        step: called with each measurement.
    """
    if tuning.is_tuned(device):
        return
    log(f"timing the kernels on {torch.cuda.get_device_name(device)}: a minute or two, once for this GPU model")
    keep(tune(device, step or (lambda line: None)), device, log)


def keep(found: Tuning, device: int, log: Log) -> None:
    path = tuning.cache_file(device)
    try:
        tuning.save(found, path)
    except OSError as error:
        warnings.warn(
            f"{path} cannot be written ({error.strerror}), so the next run times the kernels again; set "
            "XDG_CACHE_HOME to a writable folder",
            stacklevel=2,
        )
        return
    changed = [f"{name} {getattr(found, name)}" for name in CHOICES if getattr(found, name) != getattr(DEFAULT, name)]
    log(f"{path}: {'; '.join(changed) if changed else 'as on an H200'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--again", action="store_true", help="even if this GPU model was measured before")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("error: tuning needs a CUDA device and there is none here")
    if find_spec("triton") is None:
        sys.exit("error: tuning needs triton, which is not installed; pip install triton")
    device = torch.cuda.current_device()
    say: Log = functools.partial(print, flush=True)
    if args.again:
        keep(tune(device, say), device, say)
    elif tuning.is_tuned(device):
        say(f"{torch.cuda.get_device_name(device)} is already tuned; --again tunes it again")
    else:
        tune_once(device, say, say)


if __name__ == "__main__":
    main()
