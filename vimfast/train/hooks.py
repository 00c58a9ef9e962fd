"""What happens alongside training: reports, health, checkpoints, records."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vimfast import dist
from vimfast.checkpoint import CHECKPOINT
from vimfast.errors import UserError
from vimfast.train.loop import EpochEnd, Hook, Place, TrainingRun
from vimfast.train.pace import Stretch
from vimfast.train.report import Reporter, duration, memory_gib
from vimfast.train.run_state import save_run
from vimfast.train.start_up import StartUp
from vimfast.train.step import Health
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


class GradientHealth:
    """Reports skipped steps, and ends a run that does nothing but skip. Gradients are the same on all processes.

    Args:
        limit: steps in a row.
        folder: of the run; for the error, which names the last checkpoint.
    """

    def __init__(self, run: TrainingRun, limit: int, folder: Path | None) -> None:
        self._run, self._limit, self._folder = run, limit, folder
        self._skipped = 0

    def check(self, place: Place, counts: list[float] | None = None, lr: float | None = None) -> None:
        """Raises a UserError where there is nothing to continue with.

        Args:
            counts, lr: those of :attr:`TrainStep.counts` and the learning rate, as they were at `place`; None: as they
                are, for which the host waits.
        """
        if counts is not None and counts[0] == self._skipped:
            return
        health: Health = self._run.train_step.health()
        if counts is not None:
            health = Health(int(counts[0]), int(counts[2]), health.names)
        first = f", first in {', '.join(health.names[:3])}" if health.names else ""
        lr = self._run.rate.value if lr is None else lr
        where = f"epoch {place.epoch}, step {place.step}, learning rate {lr:.3g}{first}"
        if health.in_a_row >= min(self._limit, place.steps):
            own = self._folder / CHECKPOINT if self._folder else None
            kept = f"; {own} is from before" if own is not None and own.exists() else ""
            raise UserError(
                f"the gradients of {health.in_a_row} steps in a row are non-finite, by {where}",
                f"try a lower --lr, --clip-grad 1 or --no_amp{kept}",
            )
        if health.skipped > self._skipped:
            count = health.skipped - self._skipped
            steps = f"{count} step{'s' * (count != 1)}"
            self._run.report.warn(f"{steps} skipped because of non-finite gradients, by {where}")
            self._skipped = health.skipped


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

    def __init__(self, run: TrainingRun, health: GradientHealth, every: int) -> None:
        self._run, self._health, self._every = run, health, every
        self._steps_here, self._settled = 0, False
        self._asked: _Asked | None = None
        self._before = (0.0, 0.0)  # sums at the last report
        self._since = Mark(run.world.device)

    def epoch_begin(self, place: Place) -> None:
        now = self._run.sums.read() if place.step else {"loss": 0.0, "steps": 0.0}
        self._before = now["loss"], now["steps"]
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
        speed, share = asked.stretch.images * run.world.size / seconds, asked.stretch.data_share(seconds)
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
        return share

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


class Checkpoints(Hook):
    """Saves the run in `folder`: every `every` steps, after each epoch, and where it is told to stop.

    Args:
        every: None for none within an epoch.
        extra: arguments of :func:`save_run` that stay the same: ``keep``, and what the state holds beside what changes.
    """

    def __init__(
        self, run: TrainingRun, health: GradientHealth, folder: Path, every: int | None, extra: dict[str, Any]
    ) -> None:
        self._run, self._health, self._folder, self._every, self._extra = run, health, folder, every, extra
        self._saved: tuple[int, int] | None = None  # the place that the checkpoint holds

    def save(self, place: Place, *, best: bool = False, evaluated: bool = False) -> None:
        """Write the state of the run, as the `best` one too if it is; every process must call it.

        Raises:
            UserError: the gradients are non-finite by now, so the weights are of no use: what is on disk stays.
        """
        self._run.control.doing("saving")
        self._health.check(place)
        save_run(self._run, self._folder, best=best, evaluated=evaluated, **self._extra)
        self._saved = place.epoch, place.step

    def after_step(self, place: Place) -> None:
        if self._every and place.step % self._every == 0 and place.step < place.steps:
            self.save(place)

    def bad_data(self, place: Place) -> None:
        if self._run.world.size == 1:  # of several, the others are inside the step by now, and wait for this one
            self.save(place)

    def stopped(self, place: Place) -> None:
        if self._saved != (place.epoch, place.step):
            self.save(place)
        self._run.report.say(f"stopped at {place}; {self._folder / CHECKPOINT} holds it, resume with --resume auto")

    def epoch_trained(self, place: Place) -> None:
        self.save(place)

    def epoch_end(self, place: Place, end: EpochEnd) -> None:
        self.save(place, best=end.best, evaluated=True)


class NoCheckpoints(Hook):
    """For a run without a folder."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def stopped(self, place: Place) -> None:
        self._run.report.say(f"stopped at {place}")


class Records(Hook):
    """One JSON line an epoch in ``log.txt``, under hustvl/Vim's names, and the same figures in TensorBoard."""

    def __init__(self, run: TrainingRun) -> None:
        self._report = run.report
        self._parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)

    def epoch_end(self, place: Place, end: EpochEnd) -> None:
        record: dict[str, Any] = {"train_lr": end.lr, "train_loss": end.loss}
        for whose, found in end.scores.items():
            record |= {f"{whose}test_{name}": value for name, value in found._asdict().items() if name != "images"}
        self._report.say(f"Max accuracy: {place.best_acc1:.2f}%")
        self._report.record({**record, "epoch": end.epoch, "n_parameters": self._parameters})
        self._report.scalars({f"epoch/{k}": v for k, v in record.items()}, end.epoch)
