"""Before the first step of a run, or of a stage: kernels tuned, batches begun, the step captured, a decoder chosen."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch
from torch import nn

from vimfast import dist
from vimfast.errors import duration
from vimfast.train.curriculum import TrainingStage
from vimfast.train.depth import StochasticDepth
from vimfast.train.fitting import blank_batch
from vimfast.train.loop import EpochEnd, Hook, Place, Precision, TrainingRun
from vimfast.train.start_up import StartUp
from vimfast_kernels.tune import tune_once
from vimfast_kernels.tuning import read_again

AHEAD = 100  # steps in which a loader that is about to be needed builds what decodes, and decodes the first batches


def kernels(model: nn.Module, precision: Precision) -> str:
    """Names of the kernels in use; empty for a model that has no choice of them."""
    explain = getattr(model, "kernels", None)
    return "" if explain is None else explain(precision.dtype)


class StageEntry(Hook):
    """Has model, step and loader be those of the epoch's stage.

    A stage is entered where an epoch begins, not where its first batch arrives: a loader reads ahead. The loader of the
    stage that follows begins on its batches :data:`AHEAD` steps earlier, so that nothing waits for it.

    Args:
        capture: the step of each stage as a CUDA graph.
        depth: of the model; None: its rate is the same in all stages.
    """

    def __init__(self, run: TrainingRun, *, capture: bool, depth: StochasticDepth | None) -> None:
        self._run, self._capture, self._depth = run, capture, depth
        self._entered: TrainingStage | None = None
        self._begun: TrainingStage | None = None
        self._seconds: float | None = None  # of a batch on the GPU

    def enter(self, epoch: int) -> None:
        """Prepare for the steps of an epoch, whose loader has begun; every process must call it at the same place."""
        run, stage = self._run, self._run.curriculum.at(epoch)
        if self._entered is not None or run.train_step.accum_steps != stage.accum_steps:
            run.evaluated.forget()  # whose graph shares the memory that is to be free
            run.train_step.restart(stage.accum_steps)
        if self._depth is not None:
            self._depth.set(stage.config.model.drop_path)
        self._entered, self._seconds = stage, None
        if not self._capture:
            return
        with run.memory(stage):
            size = stage.loader.view.size_in(epoch)
            batch = blank_batch(run.world.device, stage.loader.order.batch_size, size, stage.mixup, run.objective)
            run.capture(*batch)
        if run.train_step.captured:
            run.train_step.time_replays()
            self._seconds = min(dist.gather_objects(run.train_step.seconds))
            stage.loader.expect(self._seconds)

    def epoch_begin(self, place: Place) -> None:
        run, stage = self._run, self._run.stage
        if stage is self._entered:
            return
        run.control.doing("preparing the training step for another stage")
        begin = time.perf_counter()
        self.enter(place.epoch)
        stages, seconds = run.curriculum.stages, run.train_step.seconds
        text = f"stage {stages.index(stage) + 1} of {len(stages)}, prepared in {time.perf_counter() - begin:.1f} s"
        if seconds is not None:
            its = duration(stage.updates * stage.accum_steps * seconds)
            text += f"; at least {its} of GPU time for the steps of its {len(stage.epochs)} epochs"
        run.report.say(text)

    def after_step(self, place: Place) -> None:
        run, following = self._run, self._run.curriculum.after(self._run.stage)
        if following is None or following is self._begun or place.epoch != run.stage.epochs[-1]:
            return
        if place.steps - place.step <= AHEAD:
            self._begun = following
            if self._seconds is not None:
                here, there = (own.work / own.accum_steps for own in (run.stage, following))
                following.loader.expect(self._seconds * there / here)
            following.loader.begin(following.epochs.start)

    def epoch_trained(self, place: Place) -> None:
        stage = self._run.stage
        if place.epoch == stage.epochs[-1] and self._run.curriculum.after(stage) is not None:
            stage.loader.close()  # what it has read ahead is of no stage

    def returned(self, place: Place) -> None:
        self._begun = None


class EvaluationAhead(Hook):
    """Begins on the images of an evaluation in the last :data:`AHEAD` steps before it, so that it waits for none."""

    def __init__(self, run: TrainingRun) -> None:
        self._run, self._begun = run, False

    def after_step(self, place: Place) -> None:
        evaluated = self._run.evaluated
        if not self._begun and place.steps - place.step <= AHEAD and evaluated.due(place.epoch, self._run.epochs):
            self._begun = True
            evaluated.loader.begin(0)

    def epoch_end(self, place: Place, end: EpochEnd) -> None:
        self._begun = False


def prepare_device(run: TrainingRun, entry: StageEntry, start_up: StartUp) -> None:
    """Tune kernels, begin the first batches, capture the step, and choose the decoder by what it takes."""
    if run.world.device.type == "cuda":
        _tune(run)
        start_up.done("kernels")
    if run.next_step is None:
        return
    run.control.doing("preparing the training step")
    epoch, step = run.next_step
    stage = run.curriculum.at(epoch)
    stage.loader.begin(epoch, step * stage.accum_steps)
    entry.enter(epoch)


class Trial(NamedTuple):
    """What the step of a stage takes of the GPU."""

    seconds: float  # for forward and backward of a batch
    gib: float  # of memory that torch holds then


def try_stages(run: TrainingRun, entry: StageEntry) -> dict[TrainingStage, Trial]:
    """Enter all stages, that of the next step last: for a run that is about to end without training.

    Returns: nothing of stages whose steps are launched, as those are not timed, nor of a single stage.

    Raises:
        UserError: there is too little memory for one of them.
    """
    found: dict[TrainingStage, Trial] = {}
    if run.next_step is None or not run.train_step.captured or len(run.curriculum.stages) == 1:
        return found
    here = run.next_stage
    for stage in [*(other for other in run.curriculum.stages if other is not here), here]:
        run.control.doing("trying the training step of each stage")
        entry.enter(stage.epochs.start)
        if run.train_step.seconds is not None:
            found[stage] = Trial(run.train_step.seconds, torch.cuda.memory_reserved(run.world.device) / 2**30)
    return found


def _tune(run: TrainingRun) -> None:
    """Once for a kind of GPU: a process of each host times the kernels, the others wait and read what it found."""
    if kernels(run.model, run.precision) == "gluon" and run.world.local_rank == 0:
        run.control.doing("tuning kernels")
        tune_once(torch.cuda.current_device(), run.report.say)
    else:
        run.control.doing("waiting for rank 0 of its host to tune kernels")
    dist.barrier()
    read_again()
