"""Where a run resumes from, and what is saved of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vimfast import dist
from vimfast.checkpoint import load_optimizer, load_weights, save_checkpoint, weights_held
from vimfast.config import RunConfig
from vimfast.errors import UserError
from vimfast.train.loop import TrainingRun
from vimfast.train.optim import WeightAverage
from vimfast.train.report import Reporter

CHECKPOINT, BEST = "checkpoint.pth", "best_checkpoint.pth"

State = dict[str, Any]


def checkpoint_to_start_from(run: RunConfig, finetune: str, folder: Path | None) -> Path | None:
    """The checkpoint that a run resumes from or evaluates; None: it starts from nothing.

    Raises:
        UserError: there is nothing to evaluate, or the run would overwrite another.
    """
    own = folder / CHECKPOINT if folder else None
    if run.resume == "auto":
        if own is None:
            raise UserError("--resume auto looks in --output_dir, which is not given; add it")
        return own if own.exists() else None
    path = Path(run.resume) if run.resume else None
    if run.eval:
        if path is None and finetune:
            path = Path(finetune)
        if path is None:
            raise UserError("--eval has nothing to evaluate; add --resume CHECKPOINT")
        return path
    if own is not None and own.exists() and (path is None or path.resolve() != own.resolve()):
        raise UserError(
            f"{own} holds an earlier run, which would be overwritten; continue it with --resume auto, "
            "or choose another --output_dir"
        )
    return path


def check_classes(count: int, wanted: int | None, state: State | None, origin: str, data: str) -> None:
    """Whether data, flags and checkpoint are of the same number of classes."""
    if wanted is not None and wanted != count:
        raise UserError(f"--num-classes is {wanted} and the data has {count} classes; drop the flag")
    head = state["model"].get("head.weight") if state is not None else None
    if head is not None and len(head) != count:
        raise UserError(
            f"{origin} was trained on {len(head)} classes and {data} has {count}; "
            "point --data-path at the data it belongs to"
        )


def load_models(
    state: State,
    origin: str,
    model: nn.Module,
    average: WeightAverage | None,
    report: Reporter,
    *,
    resample: str | None,
    evaluating: bool,
) -> WeightAverage | None:
    """Load weights and their average; returns the average, or None where there is none to evaluate.

    Args:
        resample: as :func:`load_weights` has it.
    """
    report.say(f"{origin}: {weights_held(state)}")
    for line in load_weights(model, state["model"], origin, resample=resample):
        report.say(line)
    if average is None:
        return None
    if isinstance(state.get("model_ema"), dict):
        load_weights(average.module, state["model_ema"], f"the average in {origin}", resample=resample)
    elif evaluating:
        return None
    else:
        average.module.load_state_dict(model.state_dict())
        report.warn(f"{origin} holds no averaged weights; the average starts again from the raw ones")
    return average


def load_place(run: TrainingRun, state: State, origin: str, global_batch: int) -> None:
    """Load optimizer, place in the data, sums and random states; a file with weights alone starts a new run."""
    if "optimizer" not in state or "epoch" not in state:
        return
    place = run.place
    try:
        load_optimizer(run.optimizer, run.model, state)
    except (ValueError, KeyError) as error:
        raise UserError(f"{origin} was trained with another optimizer ({error}); give its --opt") from None
    place.best_acc1 = float(state.get("best_acc1", 0.0))
    place.epoch, place.step = int(state["epoch"]), int(state.get("step", place.steps))
    if state.get("evaluated", True) and place.step >= state.get("steps", place.steps):
        place.epoch, place.step = place.epoch + 1, 0
    if place.step and (state["steps"], state["global_batch"]) != (place.steps, global_batch):
        fix = "the data and --steps-per-epoch as they were"
        if state["global_batch"] != global_batch:
            fix = (
                "processes x --batch-size x --accum-steps as it was, "
                f"or give --global-batch-size {state['global_batch']}"
            )
        raise UserError(
            f"the checkpoint stands inside an epoch of {state['steps']} steps of {state['global_batch']} images, "
            f"this run has {place.steps} of {global_batch}; keep {fix}"
        )
    world, processes = run.world, state.get("processes", [])
    if len(processes) != world.size:  # sums are the run's, random states a process's own
        totals = [sum(values) for values in zip(*(p["sums"] for p in processes), strict=True)]
        if world.is_main and totals and place.step:
            run.sums.values.copy_(torch.tensor(totals, dtype=torch.float64))
        return
    own = processes[world.rank]
    if place.step:
        run.sums.values.copy_(torch.tensor(own["sums"], dtype=torch.float64))
    torch.set_rng_state(own["torch"])
    if own["cuda"] is not None and world.device.type == "cuda":
        torch.cuda.set_rng_state(own["cuda"], world.device)


def save_run(
    run: TrainingRun,
    paths: Sequence[Path],
    *,
    evaluated: bool,
    global_batch: int,
    classes: Sequence[str],
    config: dict[str, Any],
) -> None:
    """Write the state of the run to each of `paths`; every process must call it.

    Args:
        evaluated: the epoch that the run stands at the end of has been.
    """
    world, place = run.world, run.place
    cuda = torch.cuda.get_rng_state(world.device) if world.device.type == "cuda" else None
    own = {"torch": torch.get_rng_state(), "cuda": cuda, "sums": run.sums.values.tolist()}
    processes = dist.gather_objects(own)
    if world.is_main:
        state = {
            "model": run.model.state_dict(),
            "model_ema": run.average.module.state_dict() if run.average else None,
            "optimizer": run.optimizer.state_dict(),
            "epoch": place.epoch,
            "step": place.step,
            "steps": place.steps,
            "global_batch": global_batch,
            "evaluated": evaluated,
            "best_acc1": place.best_acc1,
            "processes": processes,
            "classes": list(classes),
            "config": config,
        }
        for path in paths:
            save_checkpoint(path, state)
    else:
        run.control.doing("waiting for rank 0 to save")
    dist.barrier()
