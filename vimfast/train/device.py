"""Before the first step: kernels tuned, batches begun, the step captured, a decoder chosen by what it takes."""

from __future__ import annotations

import torch
from torch import nn

from vimfast import dist
from vimfast.config import ModelConfig
from vimfast.train.fitting import blank_batch
from vimfast.train.loop import Precision, TrainingRun
from vimfast.train.start_up import StartUp
from vimfast_kernels.tune import tune_once
from vimfast_kernels.tuning import read_again


def kernels(model: nn.Module, precision: Precision) -> str:
    """Names of the kernels in use; empty for a model that has no choice of them."""
    explain = getattr(model, "kernels", None)
    return "" if explain is None else explain(precision.dtype)


def prepare_device(run: TrainingRun, cfg: ModelConfig, start_up: StartUp) -> None:
    """Tune kernels, begin the first batches, capture the step, and choose the decoder by what it takes."""
    if run.world.device.type == "cuda":
        _tune(run)
        start_up.done("kernels")
    if run.next_step is None:
        return
    run.control.doing("preparing the training step")
    epoch, step = run.next_step
    run.loader.begin(epoch, step * run.accum_steps)
    if run.world.device.type == "cuda" and cfg.cuda_graph and getattr(run.model, "capturable", False):
        with run.memory():
            size = run.loader.view.size_in(epoch)
            run.capture(*blank_batch(run.world.device, run.loader.order.batch_size, size, run.mixup, run.objective))
        if run.train_step.captured:
            run.train_step.time_replays()
            run.loader.expect(min(dist.gather_objects(run.train_step.seconds)))


def _tune(run: TrainingRun) -> None:
    """Once for a kind of GPU: a process of each host times the kernels, the others wait and read what it found."""
    if kernels(run.model, run.precision) == "gluon" and run.world.local_rank == 0:
        run.control.doing("tuning kernels")
        tune_once(torch.cuda.current_device(), run.report.say)
    else:
        run.control.doing("waiting for rank 0 of its host to tune kernels")
    dist.barrier()
    read_again()
