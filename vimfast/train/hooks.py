"""What happens alongside training: reports and records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from vimfast import dist
from vimfast.train.health import GradientHealth, LossHealth
from vimfast.train.loop import EpochEnd, Hook, Place, TrainingRun
from vimfast.train.pace import Stretch
from vimfast.train.report import Reporter, duration, memory_gib
from vimfast.train.start_up import StartUp
from vimfast.train.sums import Mark, Reading

SETTLED_AFTER = 100  # steps after which a run's pace is known
TOLERATED = 0.03  # of the time, spent waiting for data


class Beginning(Hook):
    """Reports how long the first step took to come."""

    def __init__(self, start_up: StartUp, report: Reporter) -> None:
        self._start_up, self._report = start_up, report
        self._done = False

    def after_step(self, place: Place) -> None:
        if not self._done:
            self._done = True
            self._start_up.done("first batch")
            self._report.say(str(self._start_up))


@dataclass
class _Asked:
    """A report whose figures are on their way."""

    epoch: int
    step: int
    lr: float
    stretch: Stretch
    reading: Reading


class Progress(Hook):
    """Reports loss and speed every `every` steps, and once finds out whether another decoder would do better.

    The figures are read while the device is busy with the step after them, so a report does not hold it up.
    """

    def __init__(self, run: TrainingRun, health: GradientHealth, losses: LossHealth, every: int) -> None:
        self._run, self._health, self._losses, self._every = run, health, losses, every
        self._steps_here, self._settled = 0, False
        self._asked: _Asked | None = None
        self._before = (0.0, 0.0)  # sums at the last report
        self._since = Mark(run.world.device)

    def epoch_begin(self, place: Place) -> None:
        now = self._run.sums.read() if place.step else {"loss": 0.0, "steps": 0.0}
        self._before = now["loss"], now["steps"]
        self._asked = None  # of steps that were rolled back
        self._since = Mark(self._run.world.device)

    def after_step(self, place: Place) -> None:
        self._steps_here += 1
        share = self._flush(place)
        if share is not None and place.step < place.steps:
            self._reconsider(share)
        if place.step % self._every == 0 or place.step == place.steps:
            run = self._run
            reading = Reading(run.sums.values, [run.train_step.counts])
            self._asked = _Asked(place.epoch, place.step, run.rate.value, run.pace.cut(), reading)

    def epoch_trained(self, place: Place) -> None:
        self._flush(place)

    def bad_data(self, place: Place) -> None:
        self._flush(place)

    def stopped(self, place: Place) -> None:
        self._flush(place)

    def _flush(self, place: Place) -> float | None:
        """Report what was asked for, if anything was; returns the share of the time spent waiting for data."""
        asked, self._asked = self._asked, None
        return None if asked is None else self._report(asked, place)

    def _report(self, asked: _Asked, place: Place) -> float:
        run, (loss_before, steps_before) = self._run, self._before
        loss_sum, steps, *counts = asked.reading.get()
        self._health.check(Place(place.steps, asked.epoch, asked.step), counts, asked.lr)
        loss = (loss_sum - loss_before) / (steps - steps_before) if steps > steps_before else math.nan
        seconds = max(asked.reading.mark.since(self._since), 1e-9)
        images, share = asked.stretch.images * run.world.size, asked.stretch.data_share(seconds)
        speed = images / seconds
        run.pace.spend(images, seconds, share)
        left = (run.epochs - asked.epoch) * place.steps - asked.step
        each = seconds / max(asked.stretch.steps / run.accum_steps, 1)
        memory = memory_gib(run.world.device)
        run.report.news(
            f"epoch {asked.epoch} [{asked.step}/{place.steps}]",
            f"loss {loss:.4f} lr {asked.lr:.3g} {speed:,.0f} img/s, waiting for data {share:.0%}, {memory:.1f} GiB, "
            f"{duration(left * each)} left",
        )
        scalars = {"loss": loss, "lr": asked.lr, "img_s": speed, "data_share": share, "memory_gib": memory}
        at = asked.epoch * place.steps + asked.step
        run.report.scalars({f"train/{name}": value for name, value in scalars.items()}, at)
        self._before, self._since = (loss_sum, steps), asked.reading.mark
        self._losses.check(loss, Place(place.steps, asked.epoch, asked.step), counts[0])
        return share

    def returned(self, place: Place) -> None:
        self._asked = None
        self._health.reset()
        self._losses.returned(place)

    def _reconsider(self, share: float) -> None:
        """Once, when the run has found its pace: let another decoder try if the slowest process waits for this one."""
        if self._settled or self._steps_here < SETTLED_AFTER:
            return
        self._settled = True
        waits = max(dist.gather_objects(share))
        if waits <= TOLERATED:
            return
        loader = self._run.loader
        before = loader.settings.decoder
        if decoder := loader.reconsider():
            self._run.report.say(
                f"training waits {waits:.0%} of its time for --decoder {before}; {decoder} from now on"
            )


class Records(Hook):
    """One JSON line an epoch in ``log.txt``, under hustvl/Vim's names, and the same figures in TensorBoard.

    Args:
        table: write them as ``log.csv`` too.
    """

    def __init__(self, run: TrainingRun, table: bool = False) -> None:
        self._report, self._table = run.report, table
        self._parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)

    def epoch_end(self, place: Place, end: EpochEnd) -> None:
        record: dict[str, Any] = {"train_lr": end.lr, "train_loss": end.loss}
        for whose, found in end.scores.items():
            record |= {f"{whose}test_{name}": value for name, value in found._asdict().items() if name != "images"}
        self._report.say(f"Max accuracy: {place.best_acc1:.2f}%")
        self._report.record({**record, "epoch": end.epoch, "n_parameters": self._parameters})
        if self._table:
            self._report.table_of_records()
        self._report.scalars({f"epoch/{k}": v for k, v in record.items()}, end.epoch)
