"""What ``--batch-size auto`` trains on: the largest batch of which a GPU has memory for a step."""

from __future__ import annotations

import gc
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from vimfast import dist
from vimfast.checkpoint import Loaded
from vimfast.config import Config
from vimfast.config.choices import AUTO
from vimfast.data.relabelling import open_mapped
from vimfast.dist import World
from vimfast.errors import UserError, lacks_memory
from vimfast.image_size import ImageSize
from vimfast.train.compiling import captures
from vimfast.train.fitting import blank_batch, largest_batch
from vimfast.train.loaders import cache_settings
from vimfast.train.losses import Objective
from vimfast.train.mixing import Mixup
from vimfast.train.model import build_models, build_step
from vimfast.train.optim import build_optimizer, peak_lr
from vimfast.train.report import Reporter

# Of what is free on the GPU; the rest is for fragments, buffers of collectives and kernels yet to be loaded.
_SHARE = 0.92
# Bytes an image that the loader takes: 1.04 GiB for three batches of 256 ahead (docs/benchmarks.md).
_LOADER = 4_400_000


def with_batch_size(
    cfg: Config, world: World, start: Loaded | None, sizes: Collection[ImageSize], report: Reporter
) -> Config:
    """The settings with a number in place of ``--batch-size auto``: the checkpoint's, or else the largest that fits on
    all GPUs. Every process must call it.

    Args:
        sizes: of the images that are trained on.

    Raises:
        UserError: there is no GPU to try on, or not even one image fits.
    """
    if cfg.data.batch_size != AUTO:
        return cfg
    found = (start.state.get("config") or {}).get("data", {}).get("batch_size") if start is not None else None
    if isinstance(found, int):
        report.say(f"--batch-size {AUTO}: {found}, as the run of {start.path if start else ''} found")
        return _given(cfg, found)
    if cfg.run.eval:
        raise UserError(f"--batch-size {AUTO} is for training", "give --eval-batch-size a number")
    if world.device.type != "cuda":
        raise UserError(
            f"--batch-size {AUTO} tries what fits into a GPU's memory, and this run is on {world.device.type}",
            "give a number",
        )
    source = open_mapped(cfg.data.data_path, "train", cfg.data.class_map, cache_settings(cfg.data))
    begin, most = time.monotonic(), len(source) // world.size
    trial = StepTrial(cfg, len(source.classes), world, max(sizes, key=lambda size: size.pixels))
    with memory_limit(world.device):
        own = largest_batch(trial, most)
    trial.close()
    least = min(dist.gather_objects(own))
    if least == 0:
        raise UserError(f"{world.device} has too little memory for one image a step", "add --use-checkpoint")
    seconds = time.monotonic() - begin
    report.say(
        f"--batch-size {AUTO}: {least}, the most that fits of {', '.join(map(str, trial.tried))} ({seconds:.0f} s)"
    )
    return _given(cfg, least)


def _given(cfg: Config, batch_size: int) -> Config:
    return replace(cfg, data=replace(cfg.data, batch_size=batch_size))


@contextmanager
def memory_limit(device: torch.device) -> Iterator[None]:
    """In the block, torch may take no more of a GPU's memory than a run can count on."""
    free, total = torch.cuda.mem_get_info(device)
    own = torch.cuda.memory_reserved(device)
    torch.cuda.set_per_process_memory_fraction((own + _SHARE * free) / total, device)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, device)


class StepTrial:
    """Trains steps of blank images as a run with these settings would, alone, on a model of its own.

    Args:
        size: of the images.
    """

    def __init__(self, cfg: Config, num_classes: int, world: World, size: ImageSize) -> None:
        self._device, self._size = world.device, size
        self.tried: list[int] = []
        silent = Reporter(None, active=False)  # the run itself will say the same
        models = build_models(cfg, num_classes, None, world.device, silent, {size})
        self._mixup = Mixup(cfg.mix, num_classes, cfg.run.seed, world.rank)
        self._objective = Objective(cfg.distill, cfg.mix.bce_loss, models.teacher, models.precision.amp)
        optimizer = build_optimizer(cfg.optim, models.model, peak_lr(cfg.optim, 512))
        self._step = build_step(models, optimizer, self._objective, cfg.optim.clip_grad, cfg.optim.accum_steps, 1)
        self._captures = captures(models.model, cfg.model, world.device)
        models.model.train()

    def __call__(self, batch: int) -> None:
        self.tried.append(batch)
        try:
            ahead = torch.empty(batch * _LOADER, dtype=torch.uint8, device=self._device)  # noqa: F841  # the loader's
            images, targets = blank_batch(self._device, batch, self._size, self._mixup, self._objective)
            if self._captures:
                self._capture(images, targets)
            for part in range(self._step.accum_steps):
                self._step(images, targets, first=part == 0, last=part == self._step.accum_steps - 1)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
        finally:
            self._step.forget()
            if self._device.type == "cuda":
                torch.cuda.empty_cache()

    def _capture(self, images: Tensor, targets: Tensor) -> None:
        try:
            self._step.capture(images, targets)
        except RuntimeError as error:  # of any other kind: the run will say so, and launch its steps
            if lacks_memory(error):
                raise

    def close(self) -> None:
        """Give its memory back."""
        del self._step, self._objective
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
