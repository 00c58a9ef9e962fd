"""When a run is saved, and how little it waits for that."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from vimfast.checkpoint import BEST, CHECKPOINT, Background
from vimfast.config import RunConfig
from vimfast.errors import UserError
from vimfast.train.folder import RunFolder
from vimfast.train.health import GradientHealth
from vimfast.train.loop import EpochEnd, Hook, Place, TrainingRun
from vimfast.train.run_state import collect, write
from vimfast.train.sums import Mark, Reading

ASKED_EVERY = 10  # steps between two looks at the clock
PATIENCE = 10.0  # seconds that a failing run waits for a checkpoint in progress


class Checkpoints(Hook):
    """Saves the run in `folder`: in an epoch as often as wanted, after each epoch, and where it is told to stop.

    The state is copied to host memory between two steps; a thread writes it while the next steps run.

    Args:
        wanted: how often in an epoch, and how many checkpoints to keep.
        extra: arguments of :func:`collect` that stay the same.
    """

    def __init__(
        self,
        run: TrainingRun,
        health: GradientHealth,
        folder: RunFolder,
        wanted: RunConfig,
        extra: dict[str, Any],
    ) -> None:
        self._run, self._health, self._wanted, self._extra = run, health, wanted, extra
        self._held, self._folder = folder, folder.path
        self._saved: tuple[int, int] | None = None  # the place that the checkpoint holds
        self._saved_at = time.monotonic()
        self._asked: Reading | None = None
        self._background = Background()

    def save(self, place: Place, *, best: bool = False, evaluated: bool = False) -> None:
        """Begin to write the state of the run, as the `best` one too if it is; every process must call it.

        Raises:
            UserError: the gradients are non-finite by now, so the weights are of no use: what is on disk stays. Or the
                checkpoint before this one could not be written.
        """
        run = self._run
        run.control.doing("saving")
        self._health.check(place)
        self._background.finish()
        self._keep_folder()
        state = collect(run, evaluated=evaluated, **self._extra)
        if state is not None:
            there, keep = Mark(run.world.device), self._wanted.keep_checkpoints
            self._background.submit(
                partial(self._write, partial(write, state, there, self._folder, keep=keep, best=best))
            )
        self._saved, self._saved_at, self._asked = (place.epoch, place.step), time.monotonic(), None

    def _write(self, write: Callable[[], None]) -> None:
        try:
            write()
        except UserError:
            if not self._keep_folder():
                raise
            write()  # it was removed while it was written to

    def _keep_folder(self) -> bool:
        """Returns: whether it was gone."""
        gone = self._held.keep()
        if gone:
            self._run.report.warn(f"{self._folder} was removed or moved; made again, without what was in it")
        return gone

    def after_step(self, place: Place) -> None:
        self._background.check()
        every, late = self._wanted.save_every, self._is_late(place)
        due = late or (every is not None and place.step % every == 0)
        if due and place.step < place.steps:
            if self._health.is_sound:
                self.save(place)
            else:  # the first of many skipped steps, perhaps: their checkpoints would push out the good ones
                self._health.check(place)

    def _is_late(self, place: Place) -> bool:
        """Whether it is time, by rank 0's clock; all processes get the same answer at the same step."""
        minutes = self._wanted.save_minutes
        if minutes is None:
            return False
        asked, self._asked = self._asked, None
        if place.step % ASKED_EVERY == 0:
            late = self._run.world.is_main and time.monotonic() - self._saved_at >= 60 * minutes
            device = self._run.world.device
            self._asked = Reading(torch.full((1,), float(late), dtype=torch.float64, device=device), [])
        return asked is not None and asked.get()[0] > 0

    def bad_data(self, place: Place) -> None:
        if self._run.world.size == 1:  # of several, the others are inside the step by now, and wait for this one
            self.save(place)
            self._finish()
            self._say_stopped(place)

    def stopped(self, place: Place) -> None:
        if self._saved != (place.epoch, place.step):
            self.save(place)
        self._finish()
        self._say_stopped(place)

    def _say_stopped(self, place: Place) -> None:
        self._run.report.say(f"stopped at {place}; {self._folder / CHECKPOINT} holds it, resume with --resume auto")

    def epoch_trained(self, place: Place) -> None:
        if self._run.evaluated.due(place.epoch, self._run.epochs):
            self.save(place)
        else:  # the end of the epoch follows at once, and is saved
            self._health.check(place)

    def epoch_end(self, place: Place, end: EpochEnd) -> None:
        self.save(place, best=end.best, evaluated=bool(end.scores))
        if place.epoch + 1 == self._run.epochs:
            self._finish()
            best = f"the best top-1 is {place.best_acc1:.2f}%, in {self._folder / BEST}"
            self._run.report.say(f"{best}; label images with it: vimfast predict {self._folder} IMAGE")

    def diverged(self, place: Place) -> None:
        self._finish()

    def returned(self, place: Place) -> None:
        self._saved = self._asked = None

    def _finish(self) -> None:
        self._run.control.doing("writing the checkpoint")
        self._background.finish()

    def close(self, failing: bool) -> None:
        self._background.close(PATIENCE if failing else None)


class NoCheckpoints(Hook):
    """For a run without a folder."""

    def __init__(self, run: TrainingRun) -> None:
        self._run = run

    def stopped(self, place: Place) -> None:
        self._run.report.say(f"stopped at {place}")
