"""What happens alongside training: reports and records."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

from vimfast.errors import duration
from vimfast.train.health import GradientHealth, LossHealth
from vimfast.train.loop import EpochEnd, Hook, Place, TrainingRun
from vimfast.train.pace import Stretch
from vimfast.train.report import Reporter, memory_gib, watts
from vimfast.train.start_up import StartUp
from vimfast.train.sums import Mark, Reading
from vimfast.train.waiting import DataWaits

FORECAST_AFTER = 50  # steps
FORECAST_FROM = 600.0  # seconds left: what ends sooner is not waited for elsewhere


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
    """Reports loss and speed every `every` steps, once when the run will end, and what training waits for.

    The figures are read while the device is busy with the step after them, so a report does not hold it up.
    """

    def __init__(
        self, run: TrainingRun, health: GradientHealth, losses: LossHealth, waits: DataWaits, every: int
    ) -> None:
        self._run, self._health, self._losses, self._waits, self._every = run, health, losses, waits, every
        self._steps_here, self._foretold = 0, False
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
        self._health.after_step(place)
        self._waits.after_step()
        if flushed := self._flush(place):
            self._waits.look(*flushed, place)
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

    def _flush(self, place: Place) -> tuple[float, Stretch] | None:
        """Report what was asked for, if anything was; returns the share of that time spent waiting for data."""
        asked, self._asked = self._asked, None
        return None if asked is None else (self._report(asked, place), asked.stretch)

    def _report(self, asked: _Asked, place: Place) -> float:
        """Returns: the share of the time spent waiting for data."""
        run, (loss_before, steps_before) = self._run, self._before
        loss_sum, steps, *counts = asked.reading.get()
        self._health.check(Place(place.steps, asked.epoch, asked.step), counts, asked.lr)
        loss = (loss_sum - loss_before) / (steps - steps_before) if steps > steps_before else math.nan
        seconds = max(asked.reading.mark.since(self._since), 1e-9)
        images, share = asked.stretch.images * run.world.size, asked.stretch.data_share(seconds)
        speed = images / seconds
        run.pace.spend(images, seconds, share)
        left = run.curriculum.updates_left(asked.epoch, asked.step)
        each = seconds / max(asked.stretch.steps / run.accum_steps, 1)
        memory, power = memory_gib(run.world.device), watts(run.world.device)
        run.report.news(
            f"epoch {asked.epoch} [{asked.step}/{place.steps}]",
            f"loss {loss:.4f} lr {asked.lr:.3g} {speed:,.0f} img/s, waiting for data {share:.0%}, "
            f"{memory:.1f} GiB of {'GPU ' if run.world.device.type == 'cuda' else ''}memory, "
            f"{f'{power:.0f} W, ' if power is not None else ''}{duration(left * each)} left",
            f"loss {loss:.3f} {speed:,.0f} img/s, data wait {share:.0%}, {duration(left * each)} left",
        )
        self._foretell(left * each)
        scalars = {"loss": loss, "lr": asked.lr, "img_s": speed, "data_share": share, "memory_gib": memory}
        scalars |= {} if power is None else {"power_w": power}
        at = run.curriculum.updates(asked.epoch, asked.step)
        run.report.scalars({f"train/{name}": value for name, value in scalars.items()}, at)
        self._before, self._since = (loss_sum, steps), asked.reading.mark
        self._losses.check(loss, Place(place.steps, asked.epoch, asked.step), counts[0])
        return share

    def returned(self, place: Place) -> None:
        self._asked = None
        self._health.reset()
        self._losses.returned(place)

    def _foretell(self, seconds: float) -> None:
        """Once, when the pace is known, the time of day of the last step; not where that is near."""
        if not self._foretold and self._steps_here >= FORECAST_AFTER:
            self._foretold = True
            if seconds < FORECAST_FROM:
                return
            end = time.strftime("%A %d %B at %H:%M", time.localtime(time.time() + seconds))
            self._run.report.say(f"at this pace the last step ends on {end}; evaluations take extra time")


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
        if end.scores:
            self._report.say_for_scripts(f"Max accuracy: {place.best_acc1:.2f}%")
        self._report.record({**record, "epoch": end.epoch, "n_parameters": self._parameters})
        if self._table:
            self._report.table_of_records()
        self._report.scalars({f"epoch/{k}": v for k, v in record.items()}, end.epoch)
