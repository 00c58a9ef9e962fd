"""The stages of a run: what it trains with, as a function of the epoch."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from vimfast.config import Config
from vimfast.data.loader import Loader
from vimfast.train.mixing import Mixup


@dataclass(frozen=True, eq=False)
class TrainingStage:
    """What a run trains with in some of its epochs.

    Args:
        epochs: which.
        config: all settings, as they are in these epochs.
        accum_steps: batches of an update.
        rate: of the learning rate that the schedule has, this share, since rates are in proportion to batches.
    """

    epochs: range
    config: Config
    loader: Loader
    mixup: Mixup
    accum_steps: int
    rate: float = 1.0

    @property
    def steps(self) -> int:
        """Updates in an epoch."""
        return self.loader.steps // self.accum_steps

    @property
    def updates(self) -> int:
        """In all of its epochs."""
        return len(self.epochs) * self.steps

    @property
    def global_batch(self) -> int:
        """Images of an update, on all processes."""
        return self.loader.order.global_batch * self.accum_steps

    @property
    def work(self) -> int:
        """Pixels of an update on all processes, to which its time is about proportional."""
        return self.global_batch * self.loader.view.size_in(self.epochs.start).pixels


class Curriculum:
    """The stages of a run in their order.

    Args:
        stages: one or more; together they are all epochs of the run.
        peak_lr: the highest learning rate that a stage would have at its peak.
    """

    def __init__(self, stages: Sequence[TrainingStage], peak_lr: float) -> None:
        self.stages, self.peak_lr = tuple(stages), peak_lr
        self._begins = [stage.epochs.start for stage in self.stages]

    def at(self, epoch: int) -> TrainingStage:
        """The stage of an epoch; of those after the end of the run, the last one."""
        return self.stages[bisect.bisect(self._begins, epoch) - 1]

    def after(self, stage: TrainingStage) -> TrainingStage | None:
        """The stage that follows, if any does."""
        place = self.stages.index(stage) + 1
        return self.stages[place] if place < len(self.stages) else None

    def updates(self, epoch: int, step: int = 0) -> int:
        """Those of the run before this place."""
        return sum(own.steps * count for own, count in self._epochs_before(epoch)) + step

    def batches(self, epoch: int, step: int = 0) -> int:
        """Those of a process before this place."""
        before = sum(own.loader.steps * count for own, count in self._epochs_before(epoch))
        return before + step * self.at(epoch).accum_steps

    def left(self, epoch: int, step: int) -> dict[TrainingStage, int]:
        """Updates of each stage from this place on."""
        left = {own: len(range(max(own.epochs.start, epoch), own.epochs.stop)) * own.steps for own in self.stages}
        left[self.at(epoch)] -= step
        return left

    def updates_left(self, epoch: int, step: int) -> float:
        """Work from this place to the end of the run, in updates as they are here."""
        here = self.at(epoch)
        return sum(count * own.work / here.work for own, count in self.left(epoch, step).items())

    def _epochs_before(self, epoch: int) -> list[tuple[TrainingStage, int]]:
        """How many each stage has; the last one has those after the end of the run too."""
        ends = [*self._begins[1:], epoch]
        return [(own, max(min(end, epoch) - own.epochs.start, 0)) for own, end in zip(self.stages, ends, strict=True)]
