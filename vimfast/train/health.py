"""Whether training still makes progress: by its gradients, and by its loss."""

from __future__ import annotations

import math
from collections import deque
from pathlib import Path

import torch

from vimfast.checkpoint import CHECKPOINT
from vimfast.train.graphs import IN_FLIGHT
from vimfast.train.loop import Diverged, Place, TrainingRun
from vimfast.train.sums import Reading
from vimfast.train.update import Health

# Far beyond the noise of a mean over 50 steps, and reached within one or two reports where weights are ruined.
_BLOWN_UP = 2.0  # times the first loss
_LEARNED, _UNLEARNED = 0.3, 0.7  # share of the first loss that must have been gained; share of that gain to lose


class GradientHealth:
    """Reports skipped steps, and ends a run that does nothing but skip. Gradients are the same on all processes.

    Args:
        limit: steps in a row.
        folder: of the run; for the error, which names the last checkpoint.
    """

    def __init__(self, run: TrainingRun, limit: int, folder: Path | None) -> None:
        self._run, self._limit, self._folder = run, limit, folder
        self._skipped = 0
        self._behind = IN_FLIGHT if run.world.device.type == "cuda" else 0  # steps that the device may not have done
        self._asked: deque[tuple[Place, float, Reading]] = deque()  # oldest first

    @property
    def is_sound(self) -> bool:
        """Whether the last step changed the weights; the host waits for the device."""
        return not bool(self._run.train_step.counts[1])

    def after_step(self, place: Place) -> None:
        """Look whether the limit is reached, at the latest step that the device has done: the host does not wait.

        Every process looks at the same step.

        Raises:
            Diverged: it is.
        """
        here = Place(place.steps, place.epoch, place.step)
        self._asked.append((here, self._run.rate.value, Reading(None, [self._run.train_step.counts])))
        if len(self._asked) > self._behind:
            there, lr, reading = self._asked.popleft()
            counts = reading.get()
            if self._is_too_many(counts[2], there):
                self.check(there, counts, lr)

    def _is_too_many(self, in_a_row: float, place: Place) -> bool:
        return in_a_row >= min(self._limit, place.steps)

    def check(self, place: Place, counts: list[float] | None = None, lr: float | None = None) -> None:
        """Raises :class:`Diverged` where there is nothing to continue with, and says what was skipped.

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
        if self._is_too_many(health.in_a_row, place):
            own = self._folder / CHECKPOINT if self._folder else None
            kept = f"; {own} is from before" if own is not None and own.exists() else ""
            helps = _what_helps(self._run)
            helps += ["--no_amp"] if self._run.precision.dtype != torch.float32 else []
            helps += ["--on-divergence rollback"] if self._run.recover is None else []
            raise Diverged(
                f"the gradients of {health.in_a_row} steps in a row are non-finite, by {where}",
                f"try {', '.join(helps)}{kept}",
            )
        if health.skipped > self._skipped:
            count = health.skipped - self._skipped
            steps = f"{count} step{'s' * (count != 1)}"
            self._run.report.warn(f"{steps} skipped because of non-finite gradients, by {where}")
            self._skipped = health.skipped

    def reset(self) -> None:
        """The counts begin again."""
        self._skipped = 0
        self._asked.clear()


def _what_helps(run: TrainingRun) -> list[str]:
    """Against any divergence, of what the run does not have."""
    clip = run.train_step.clip_grad
    return ["a lower --lr", *(["--clip-grad 1"] if clip is None or clip > 1 else [])]


class LossHealth:
    """Notices a loss that has blown up or lost most of its gain, and remembers the last place that was sound.

    The losses are means over the steps between two reports, which are the same on all processes.

    Args:
        raises: :class:`Diverged`; or else a warning, once.
    """

    def __init__(self, run: TrainingRun, *, raises: bool) -> None:
        self._run, self._raises = run, raises
        self._first = self._lowest = math.nan
        self._warned = False
        self._skipped = 0.0
        self._proven = self._retried = (-1, 0)  # epoch, step

    def is_proven(self, epoch: int, step: int) -> bool:
        """Whether training went on well from the weights of that place."""
        return self._retried != (epoch, step) < self._proven

    def returned(self, place: Place) -> None:
        """What came after this place is forgotten; if it goes badly from here again, the place is no good either."""
        self._skipped, self._retried = 0.0, (place.epoch, place.step)
        self._proven = place.epoch, place.step + 1

    def check(self, loss: float, place: Place, skipped: float) -> None:
        """With the loss of each report, and the steps skipped up to it."""
        sound, self._skipped = skipped == self._skipped, skipped
        if math.isnan(loss):  # of steps that were all skipped
            return
        if math.isnan(self._first):
            self._first = self._lowest = loss
        if not self._is_bad(loss):
            self._lowest = min(self._lowest, loss)
            if sound:
                self._proven, self._retried = (place.epoch, place.step), (-1, 0)
            return
        problem = f"the loss has risen to {loss:.4g} from {self._lowest:.4g}, by epoch {place.epoch}, step {place.step}"
        if self._raises:
            raise Diverged(problem, f"try {', or '.join(_what_helps(self._run))}")
        if not self._warned:
            self._warned = True
            self._run.report.warn(f"{problem}; --on-divergence rollback would return to the last checkpoint")

    def _is_bad(self, loss: float) -> bool:
        gone = self._first - self._lowest
        collapsed = gone > _LEARNED * abs(self._first) and loss > self._lowest + _UNLEARNED * gone
        return collapsed or loss > _BLOWN_UP * abs(self._first)
