"""Back to the last good checkpoint where training diverges, at most ``--max-rollbacks`` times."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vimfast import dist
from vimfast.checkpoint import DamagedCheckpoint, kept_checkpoints, load_checkpoint, set_aside
from vimfast.config import Config
from vimfast.train.health import LossHealth
from vimfast.train.loop import Diverged, TrainingRun
from vimfast.train.run_state import FACTOR, State, load_models, load_place, take_turns


class Rollback:
    """What a run does when it has diverged, instead of ending.

    It resumes from the last checkpoint after which training went on well, for the weights of later ones may be ruined.
    From there on the learning rate is half of what it was, and what is left of the epoch comes in another order.

    Args:
        folder: of the run.
        losses: know the last place that is proven to be sound.
    """

    def __init__(self, run: TrainingRun, cfg: Config, folder: Path, losses: LossHealth) -> None:
        self._run, self._folder, self._losses = run, folder, losses
        self._cfg = replace(cfg, run=replace(cfg.run, start_epoch=None))  # the checkpoint says where

    def __call__(self, error: Diverged) -> None:
        """Every process must call it, at the same place. Raises the error where there is no way back."""
        run, most = self._run, self._cfg.optim.max_rollbacks
        if len(run.turns) >= most:
            raise Diverged(f"{error.problem}, after {most} rollbacks (--max-rollbacks)", error.fix)
        for hook in run.hooks:
            hook.diverged(run.place)
        dist.barrier()  # rank 0 has written what it had begun
        path, state = self._choose(error)
        place, origin = run.place, str(path)
        was = str(place)
        turns = run.turns  # more than the checkpoint may know of
        load_models(state, origin, run.model, run.average, run.report, resample=None, evaluating=False)
        load_place(run, state, origin, self._cfg, ())
        epoch, step = run.next_step or (place.epoch, place.step)
        take_turns(run, [*turns, (epoch, step)])
        run.train_step.forget_skips()
        dist.barrier()  # all have read it
        if run.report.active:
            set_aside(self._folder, path)
            run.report.records_from(place.epoch)
        for hook in run.hooks:
            hook.returned(place)
        run.report.warn(
            f"{error.problem}; rolled back from {was} to {place} ({path.name}): the rest of the epoch comes in another "
            f"order, at {FACTOR ** len(run.turns):g} x the learning rate (rollback {len(run.turns)} of {most})"
        )

    def _choose(self, error: Diverged) -> tuple[Path, State]:
        """The newest one that is proven to be sound, or else the oldest that is kept; the same on all processes."""
        found: tuple[Path, State] | None = None
        for path in kept_checkpoints(self._folder):
            try:
                state = load_checkpoint(path)
            except DamagedCheckpoint:
                continue
            if "optimizer" in state:
                found = path, state
                if self._losses.is_proven(int(state["epoch"]), int(state.get("step", self._run.place.steps))):
                    break
        names = dist.gather_objects(None if found is None else found[0].name)
        if found is None:
            raise Diverged(f"{error.problem}, before there was a checkpoint to return to", error.fix)
        if len(set(names)) > 1:
            raise Diverged(f"{error.problem}, and processes find different checkpoints to return to", error.fix)
        return found
