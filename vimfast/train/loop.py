"""The events of a run in their order."""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from vimfast import dist
from vimfast.data.loader import Loader
from vimfast.data.views import Batch
from vimfast.dist import World
from vimfast.errors import UserError, counted, duration, lacks_memory
from vimfast.processes.control import Control, Stopped
from vimfast.train.answers import Answers
from vimfast.train.compiling import compiler_errors, uncompiled
from vimfast.train.curriculum import Curriculum, TrainingStage
from vimfast.train.evaluation import Scores, evaluate
from vimfast.train.fitting import blank_batch, largest_batch
from vimfast.train.folder import RunFolder
from vimfast.train.forward import Forward
from vimfast.train.gradients import copy_from_first
from vimfast.train.graphs import Pool
from vimfast.train.losses import Objective
from vimfast.train.mixing import Mixup
from vimfast.train.optim import LearningRate, WeightAverage
from vimfast.train.pace import Pace
from vimfast.train.randomness import RandomStates, random_states, set_random_states
from vimfast.train.report import Reporter
from vimfast.train.step import TrainStep
from vimfast.train.sums import Sums

NO_ACC1 = -1.0  # below any accuracy, so that the first evaluation is the best so far


class Diverged(UserError):
    """Training has diverged; raised on all processes at the same place."""


@dataclass
class Place:
    """The place in a run: the epoch in progress and the steps done in it.

    With the seed it fixes the images, their crops and their mixing, so a checkpoint needs no more than it, the weights,
    the optimizer and torch's random states to continue exactly where the run stopped.
    """

    steps: int  # in an epoch
    epoch: int = 0
    step: int = 0
    best_acc1: float = NO_ACC1

    def __str__(self) -> str:
        return f"epoch {self.epoch}, step {self.step} of {self.steps}"


class EpochEnd(NamedTuple):
    """What is known once an epoch has been trained, and evaluated if that was due."""

    epoch: int
    lr: float
    loss: float  # mean over the epoch's steps that count
    scores: dict[str, Scores]  # of the weights (""), and of their average ("ema_"); empty where it was not evaluated
    best: bool  # of all epochs, by the weights' top-1


class Hook:
    """Acts on the events of training; override those that matter. Every process calls them, in the hooks' order."""

    def epoch_begin(self, place: Place) -> None:
        """Before the first step of an epoch, or the first after resuming in one."""

    def before_step(self, place: Place) -> None:
        """Its batch is ready."""

    def after_step(self, place: Place) -> None:
        """It has been queued on the device; `place` already points past it."""

    def bad_data(self, place: Place) -> None:
        """An image of the next step cannot be read; the run ends with an error."""

    def stopped(self, place: Place) -> None:
        """The run was told to stop, and ends here."""

    def epoch_trained(self, place: Place) -> None:
        """All steps are done, the evaluation follows."""

    def epoch_end(self, place: Place, end: EpochEnd) -> None:
        """The evaluation is done, if one was due."""

    def diverged(self, place: Place) -> None:
        """The run is about to return to an earlier place."""

    def returned(self, place: Place) -> None:
        """The run is back at this place; `epoch_begin` or `epoch_trained` follows."""

    def close(self, failing: bool) -> None:
        """The run is over; no other event follows."""


class Precision(NamedTuple):
    """What a model computes in."""

    amp: torch.autocast  # a context that does nothing, in fp32
    dtype: torch.dtype

    def __str__(self) -> str:
        return "fp32" if self.dtype == torch.float32 else "bf16 autocast"


@dataclass
class Evaluated:
    """What is evaluated, and how.

    Args:
        models: the weights under ``""``, their average under ``"ema_"``, as the record of an epoch names them.
        loader: of the validation images.
        amp: the autocast context to run under.
        captures: full batches as a CUDA graph, captured in the first evaluation and kept for the next ones.
        answers: collects those of the trained weights, if anybody wants them.
        every: epochs from one evaluation to the next.
    """

    models: dict[str, nn.Module]
    loader: Loader
    amp: torch.autocast
    report: Reporter
    control: Control
    captures: bool = False
    answers: Answers | None = None
    every: int = 1
    _forward: Forward | None = field(init=False, default=None)

    def due(self, epoch: int, epochs: int) -> bool:
        """Whether this epoch of so many ends with an evaluation; the last one always does."""
        return (epoch + 1) % self.every == 0 or epoch + 1 >= epochs

    def score(self, pool: Pool | None = None) -> dict[str, Scores]:
        """Evaluate all of it; every process must call it.

        Args:
            pool: memory of graphs that do not run meanwhile, for the graph if it is captured now.
        """
        for model in self.models.values():
            copy_from_first(model, buffers_only=True)  # running statistics, of which each process has its own
        with memory_for(self.loader, lambda: f"--eval-batch-size {max(self.loader.order.batch_size // 2, 1)}"):
            forward = self._forward or self._run_by(pool)
            with uncompiled(forward.models):
                found = evaluate(forward, self.loader, self.report, self.control, self.answers)
        scores = dict(zip(self.models, found, strict=True))
        for whose, own in scores.items():
            average = " of the averaged weights (EMA)" if whose else ""
            self.report.say(f"validation{average}: {own.describe(len(self.loader.source.classes))}")
            for line in own.like_the_original("ema network" if whose else "network"):
                self.report.say_for_scripts(line)
        return scores

    def _run_by(self, pool: Pool | None) -> Forward:
        """Kept for the next evaluations, unless it is of a copy of weights that change elsewhere."""
        there = [_on(self.loader.device, model) for model in self.models.values()]
        batch = self.loader.order.batch_size if self.captures else None
        forward = Forward(there, self.amp, self.loader.device, batch=batch, pool=pool, warn=self.report.warn)
        if there == [*self.models.values()]:
            self._forward = forward
        return forward

    def forget(self) -> None:
        """Drop the graph, whose memory others may share; the next evaluation captures it again."""
        self._forward = None


_Own = TypeVar("_Own", bound="_Closed")


class _Closed:
    """Closed at the end of its block."""

    def close(self, failing: bool = False) -> None:
        raise NotImplementedError

    def __enter__(self: _Own) -> _Own:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failing=kind is not None)


@dataclass
class EvaluationRun(_Closed):
    """A run that only evaluates."""

    evaluated: Evaluated
    precision: Precision
    report: Reporter
    control: Control
    world: World

    def run(self) -> bool:
        """Returns: whether it got to the end; False: it was told to stop."""
        try:
            self.evaluated.score()
            self.control.promise = "all is done; ending"
        except Stopped:
            self.report.say("stopped before the evaluation was complete; there is nothing to save, start it again")
            return False
        finally:
            self.report.close()
        return True

    def close(self, failing: bool = False) -> None:
        """Let go of the loader."""
        self.control.doing("closing")
        self.evaluated.forget()
        if not failing:
            _synchronize(self.world.device)
            self.evaluated.loader.close()


@dataclass
class TrainingRun(_Closed):
    """A run of training: its parts, and the order of its events.

    Args:
        place: where it stands.
        epochs: where it ends.
        curriculum: what it trains with, by epoch.
        hooks: act on its events, in this order.
        recover: makes a run that has diverged ready to continue, or raises the error.
        turns: the places (epoch, step) that it was rolled back to.
        plan: what it is going to do, on rank 0: (what, how).
    """

    place: Place
    epochs: int
    curriculum: Curriculum
    model: nn.Module
    average: WeightAverage | None
    optimizer: Optimizer
    objective: Objective
    train_step: TrainStep
    rate: LearningRate
    evaluated: Evaluated
    precision: Precision
    report: Reporter
    control: Control
    world: World
    hooks: Sequence[Hook] = ()
    folder: RunFolder | None = None  # held to the end, so that no other run writes to it
    recover: Callable[[Diverged], None] | None = None
    turns: Sequence[tuple[int, int]] = ()
    plan: Sequence[tuple[str, str]] = ()
    sums: Sums = field(init=False)
    pace: Pace = field(init=False)
    _before_parts: tuple[Tensor, RandomStates] = field(init=False)  # of the step in progress, if it has several batches

    def __post_init__(self) -> None:
        self.sums, self.pace = Sums(("loss", "steps"), self.world.device), Pace(self.world.device)

    @property
    def stage(self) -> TrainingStage:
        """What the epoch in progress trains with."""
        return self.curriculum.at(self.place.epoch)

    @property
    def next_stage(self) -> TrainingStage:
        """What the next step is trained with, or was the last one."""
        return self.curriculum.at((self.next_step or (self.place.epoch, 0))[0])

    @property
    def loader(self) -> Loader:
        """Of the training images of the epoch in progress."""
        return self.stage.loader

    @property
    def mixup(self) -> Mixup:
        """Of the epoch in progress."""
        return self.stage.mixup

    @property
    def accum_steps(self) -> int:
        """Batches of a step of the epoch in progress."""
        return self.stage.accum_steps

    @property
    def global_batch(self) -> int:
        """Images of an update of the epoch in progress, on all processes."""
        return self.stage.global_batch

    def move(self, epoch: int, step: int = 0) -> None:
        """Stand at this place from now on."""
        self.place.epoch, self.place.step, self.place.steps = epoch, step, self.curriculum.at(epoch).steps

    @property
    def next_step(self) -> tuple[int, int] | None:
        """(epoch, step) of the next step that is trained; None: nothing is left but an evaluation, or nothing."""
        place = self.place
        epoch, step = (place.epoch, place.step) if place.step < place.steps else (place.epoch + 1, 0)
        return (epoch, step) if epoch < self.epochs else None

    def run(self) -> bool:
        """Train to the last epoch.

        Returns:
            whether it got there; False: it was told to stop.

        Raises:
            UserError: among others, the fault of any process that the run was stopped for.
        """
        begin, anything = time.perf_counter(), self.place.epoch < self.epochs
        try:
            while self.place.epoch < self.epochs:
                try:
                    if self.place.step < self.place.steps:  # else it was stopped in the evaluation
                        self._train_epoch()
                    for hook in self.hooks:
                        hook.epoch_trained(self.place)
                except Diverged as error:
                    if self.recover is None:
                        raise
                    self.recover(error)
                    self.pace = Pace(self.world.device)
                    continue
                self._evaluate_epoch()
                self.move(self.place.epoch + 1)
                self.sums.values.zero_()
            if anything:
                self.report.say(f"Training time {duration(time.perf_counter() - begin)}")
            self.control.promise = "all is done; ending"
        except Stopped:
            self._stop()
            return False
        finally:
            self.report.close()
        return True

    def _stop(self) -> None:
        try:
            for hook in self.hooks:
                hook.stopped(self.place)
        except Diverged as error:
            if self.recover is None:
                raise
            self.report.warn(f"{error.problem}; stopped at {self.place} without saving, the checkpoint before it stays")
        if self.control.fault is not None:
            raise self.control.fault

    def _train_epoch(self) -> None:
        place = self.place
        self.model.train()
        batches = self.loader.epoch(place.epoch, place.step * self.accum_steps)
        self.pace = Pace(self.world.device)
        for hook in self.hooks:
            hook.epoch_begin(place)
        with self.memory(), self.report.steps(f"epoch {place.epoch}", place.steps, place.step):
            while place.step < place.steps:
                if self.control.should_stop():
                    raise Stopped
                self.rate.set(place.epoch, place.step, place.steps, self.stage.rate)
                if self.average is not None:
                    self.average.updates = self.curriculum.updates(place.epoch, place.step) + 1
                for part in range(self.accum_steps):
                    batch = self._next(batches, part)
                    if part == 0:
                        for hook in self.hooks:
                            hook.before_step(place)
                    self._train_batch(batch, part)
                    self.pace.count(len(batch.labels))
                place.step += 1
                self.report.advance()
                for hook in self.hooks:
                    hook.after_step(place)

    def _evaluate_epoch(self) -> None:
        place, trained = self.place, self.sums.read()
        due = self.evaluated.due(place.epoch, self.epochs)
        scores = self.evaluated.score(self.train_step.pool) if due else {}
        best = bool(scores) and scores[""].acc1 > place.best_acc1
        if best:
            place.best_acc1 = scores[""].acc1
        loss = trained["loss"] / trained["steps"] if trained["steps"] else math.nan
        end = EpochEnd(place.epoch, self.rate.value, loss, scores, best)
        for hook in self.hooks:
            hook.epoch_end(place, end)

    def capture(self, images: Tensor, targets: Tensor) -> None:
        """Record the step for batches of this shape as a CUDA graph.

        Every process must call it at the same place. Graphs hold collectives: if one process fails, none has graphs.
        """
        self.model.train()
        try:
            with compiler_errors():
                self.train_step.capture(images, targets)
        except RuntimeError as error:
            if lacks_memory(error):
                raise
            why = " ".join(str(error).split())
            self.report.warn(f"the step cannot be a CUDA graph ({why[:200]}); --no-cuda-graph avoids this warning")
        if not all(dist.gather_objects(self.train_step.has_captured(images, targets))):
            self.forget_graphs()

    def forget_graphs(self) -> None:
        """Drop them, of the step and of the evaluation, as they share memory."""
        self.evaluated.forget()
        self.train_step.forget()

    def memory(self, stage: TrainingStage | None = None) -> AbstractContextManager[None]:
        """Reports too little memory for the steps of a stage, or else of that of the epoch, with what helps."""
        stage = stage or self.stage
        return memory_for(stage.loader, lambda: self._smaller(stage))

    def _smaller(self, stage: TrainingStage) -> str:
        """The settings for the largest batch below that of a stage that there is memory for."""
        batch, same = stage.loader.order.batch_size, f"--global-batch-size {stage.global_batch} to train the same"
        # A step of several processes waits for the others, which may have failed too.
        found = self._largest_below(batch, stage) if self.world.size == 1 else batch // 2
        number, stages = self.curriculum.stages.index(stage), stage.config.schedule.stages
        if found and stages and "batch_size" in stages[number].changes:  # which no flag changes
            same = f"global_batch_size {stage.global_batch} to train the same in smaller parts"
            return f"batch_size {found} in stage {number + 1} of the recipe, with {same}, or --use-checkpoint"
        without = " (and no --accum-steps)" if stage.accum_steps > 1 else ""
        return (
            f"--batch-size {found} {same} in smaller parts{without}, or --use-checkpoint"
            if found
            else "--use-checkpoint"
        )

    def _largest_below(self, batch: int, stage: TrainingStage) -> int:
        self.control.doing("looking for a batch that fits")
        device, parts = self.world.device, stage.accum_steps
        size = stage.loader.view.size_in(max(self.place.epoch, stage.epochs.start))

        def trial(count: int) -> None:
            images, targets = blank_batch(device, count, size, stage.mixup, self.objective)
            for part in range(parts):
                self.train_step(images, targets, first=part == 0, last=part == parts - 1)
            _synchronize(device)

        self.forget_graphs()
        try:
            return largest_batch(trial, batch - 1)
        except RuntimeError:  # a GPU that ran out of memory is not always itself again
            return batch // 2

    def _next(self, batches: Iterator[Batch], part: int) -> Batch:
        self.control.doing("waiting for data")
        try:
            batch = self.pace.wait_for(batches)
        except UserError:
            if part > 0:
                self._undo_parts()
            for hook in self.hooks:
                hook.bad_data(self.place)
            raise
        assert batch is not None
        self.pace.between(self.train_step.end, self.loader.asked, self.loader.ready)
        self.control.doing("training step")
        return batch

    def _train_batch(self, batch: Batch, part: int) -> None:
        """Batch `part` of the `accum_steps` of this step."""
        place, last = self.place, part == self.accum_steps - 1
        number = self.curriculum.batches(place.epoch, place.step) + part
        images, targets = self.mixup(batch.images, batch.labels, number)
        images = self.objective.prepare(images)
        if part == 0 and self.train_step.captured and not self.train_step.has_captured(images, targets):
            self.control.doing("capturing the training step for another size")
            self.capture(images, targets)
            self.control.doing("training step")
        if part == 0 and not last:
            self._before_parts = self.sums.values.clone(), random_states(self.world.device)
        with compiler_errors():
            loss, sound = self.train_step(images, targets, first=part == 0, last=last)
        self.sums.add(torch.where(sound > 0, loss, 0), sound)

    def _undo_parts(self) -> None:
        """Back to where the step began whose first batches are done: no weights have changed yet."""
        self.train_step.undo()
        sums, states = self._before_parts
        self.sums.values.copy_(sums)
        set_random_states(states, self.world.device)

    def close(self, failing: bool = False) -> None:
        """Let go of the GPU: CUDA graphs, then loaders.

        Graphs have to go before the process group does: NCCL's end, in peace or not, waits for the last graph that has
        a collective in it. A process that fails gives up no more than them, as all else may wait for the device, and
        the device for a process that is gone.
        """
        self.control.doing("closing")
        for hook in self.hooks:
            hook.close(failing)
        self.forget_graphs()
        if not failing:
            _synchronize(self.world.device)
            for stage in self.curriculum.stages:
                stage.loader.close()
            self.evaluated.loader.close()
        if self.folder is not None:
            self.folder.release()


@contextmanager
def memory_for(loader: Loader, advice: Callable[[], str]) -> Iterator[None]:
    """Too little memory in the block is reported with advice, which is asked for once what the block held is free."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not lacks_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)
        batch = loader.order.batch_size
        raise UserError(
            f"{loader.device} has too little memory for {counted(batch, 'image')} a step", f"try {advice()}"
        ) from None


def _on(device: torch.device, model: nn.Module) -> nn.Module:
    """The model, or a copy of one that is kept in host memory (``--model-ema-force-cpu``)."""
    weight = next(model.parameters(), None)
    return model if weight is None or weight.device == device else copy.deepcopy(model).to(device)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
