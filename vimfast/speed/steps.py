"""Whole steps of training and inference on synthetic images."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vimfast.config import EmaConfig, OptimConfig
from vimfast.image_size import ImageSize
from vimfast.models import create_model
from vimfast.models.registry import MODELS
from vimfast.train.graphs import aside, record
from vimfast.train.optim import build_ema, build_optimizer
from vimfast.train.step import TrainStep

Run = Callable[[], object]
CLASSES = 1000
_BLOCKS = 5


@dataclass(frozen=True)
class Subject:
    """A model whose steps are measured.

    Args:
        batch, size: images of a step, and their size.
        amp: bf16 autocast.
        backend: of a Vision Mamba's kernels.
        compiled: by torch.compile.
    """

    model: str
    batch: int
    size: ImageSize
    amp: bool
    backend: str = "auto"
    compiled: bool = False

    def build(self, device: torch.device) -> nn.Module:
        options: dict[str, Any] = {"scan_backend": self.backend} if self.model in MODELS else {}
        model = create_model(self.model, img_size=self.size.plain, **options).to(device)
        if self.compiled:
            model.compile()
        return model

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.amp, cache_enabled=False)


def training(subject: Subject, device: torch.device) -> tuple[Run, Run]:
    """(run a step, capture it as a CUDA graph): the trainer's own, with fused AdamW and the average of the weights."""
    model = subject.build(device).train()
    optimizer = build_optimizer(OptimConfig(), model, 5e-4)
    average = build_ema(EmaConfig(), model)
    train = TrainStep(model, optimizer, _cross_entropy, amp=subject.autocast(device), average=average)
    images = torch.randn(subject.batch, 3, *subject.size, device=device)
    targets = torch.rand(subject.batch, CLASSES, device=device).softmax(1)
    return lambda: train(images, targets), lambda: train.capture(images, targets)


def inference(subject: Subject, device: torch.device) -> tuple[Run, Run]:
    """(run a forward pass, capture it as a CUDA graph)."""
    model = subject.build(device).eval()
    images = torch.randn(subject.batch, 3, *subject.size, device=device)
    graph: torch.cuda.CUDAGraph | None = None

    @torch.inference_mode()
    def forward() -> Tensor:
        with subject.autocast(device):
            logits: Tensor = model(images)
            return logits

    def run() -> None:
        if graph is None:
            forward()
        else:
            graph.replay()

    def capture() -> None:
        nonlocal graph
        with aside(device):
            forward()
        graph, _ = record(forward, device)

    return run, capture


class Timing(NamedTuple):
    """How long a call takes."""

    ms: float  # median of blocks of calls
    spread: float  # between the fastest block and the slowest, as a share of the median


def milliseconds(run: Run, device: torch.device, repeats: int) -> float:
    """The median of :func:`timing`."""
    return timing(run, device, repeats).ms


def timing(run: Run, device: torch.device, repeats: int) -> Timing:
    """Of one call, the device's work included; calls are not waited for one by one."""
    return timings([run], device, [repeats])[0]


def timings(runs: Sequence[Run], device: torch.device, repeats: Sequence[int]) -> list[Timing]:
    """The same of each, a block of one after a block of the other, so that all of them meet the same other load."""
    for run, count in zip(runs, repeats, strict=True):
        for _ in range(min(3, count)):
            run()
    _wait(device)
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(_BLOCKS):
        for run, count, own in zip(runs, repeats, times, strict=True):
            calls = max(count // _BLOCKS, 1)
            begin = time.perf_counter()
            for _ in range(calls):
                run()
            _wait(device)
            own.append((time.perf_counter() - begin) / calls)
    return [
        Timing(1000 * median, (max(own) - min(own)) / median) for own in times for median in [statistics.median(own)]
    ]


def repeats_for(run: Run, device: torch.device, seconds: float) -> int:
    """Calls that take about so long, by the time of one after the first, which may compile."""
    run()
    _wait(device)
    begin = time.perf_counter()
    run()
    _wait(device)
    return max(1, min(200, int(seconds / max(time.perf_counter() - begin, 1e-6))))


def peak_gib() -> float:
    """Most memory of the GPU that torch has had since the last call."""
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def _cross_entropy(images: Tensor, logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
