"""The state of a run: what is saved of it, and what it resumes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vimfast import dist
from vimfast.checkpoint import (
    BEST,
    DamagedCheckpoint,
    Loaded,
    copied,
    described,
    find_checkpoint,
    kept_checkpoints,
    load_checkpoint,
    load_found,
    load_last,
    load_optimizer,
    load_weights,
    save_checkpoint,
    save_last,
    weights_held,
)
from vimfast.config import Config, RunConfig
from vimfast.data.order import Detour
from vimfast.errors import UserError
from vimfast.train.continuity import check_order, order_version
from vimfast.train.loop import NO_ACC1, TrainingRun
from vimfast.train.optim import WeightAverage
from vimfast.train.randomness import RandomStates, random_states, set_random_states
from vimfast.train.report import Reporter
from vimfast.train.sums import Mark

FACTOR = 0.5  # of the learning rate, for each rollback; what people do by hand

State = dict[str, Any]


def load_origin(run: RunConfig, finetune: str, folder: Path | None) -> Loaded | None:
    """What a run resumes from or evaluates; None: it starts from nothing.

    Raises:
        UserError: there is nothing to evaluate, the run would overwrite another, the checkpoint cannot be used, or the
            processes see different ones.
    """
    path = checkpoint_to_start_from(run, finetune, folder)
    found = None
    if path is not None and run.resume == "auto":
        assert folder is not None
        found = load_last(folder)
    elif path is not None:
        found = _load_given(Path(run.resume or finetune), best=run.eval)
    names = dist.gather_objects(found.path.name if found else "none")
    if len(set(names)) > 1:
        raise UserError(
            f"processes find different checkpoints to resume from: {', '.join(sorted(set(names)))}",
            "give an --output_dir that all hosts see",
        )
    return found


def _load_given(path: Path, *, best: bool) -> Loaded:
    """The checkpoint that a path means; where it is a damaged file, the error names one beside it that is not."""
    try:
        return load_found(path, best=best)
    except DamagedCheckpoint as error:
        sound = next((p for p in kept_checkpoints(path.parent) if p.name != path.name and _is_sound(p)), None)
        if sound is None or path.is_dir():
            raise
        raise DamagedCheckpoint(error.problem, f"{sound} is sound, give that one") from None


def _is_sound(path: Path) -> bool:
    try:
        load_checkpoint(path)
    except UserError:
        return False
    return True


def checkpoint_to_start_from(run: RunConfig, finetune: str, folder: Path | None) -> Path | None:
    """The checkpoint that a run resumes from or evaluates; None: it starts from nothing.

    Raises:
        UserError: there is nothing to evaluate, or the run would overwrite another.
    """
    if run.resume == "auto":
        if folder is None:
            raise UserError("--resume auto looks in --output_dir, which is not given", "add it")
        return next(iter(kept_checkpoints(folder)), None)
    if run.eval:
        if not (run.resume or finetune):
            raise UserError("--eval has nothing to evaluate", "add --resume with a checkpoint or a run folder")
        return find_checkpoint(Path(run.resume or finetune), best=True)
    path = find_checkpoint(Path(run.resume), best=False) if run.resume else None
    kept = kept_checkpoints(folder) if folder else []
    if kept and (path is None or path.resolve() not in [own.resolve() for own in kept]):
        raise UserError(
            f"{kept[0]} holds an earlier run, which would be overwritten",
            "continue it with --resume auto, or choose another --output_dir",
        )
    return path


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
    report.say(f"reading {weights_held(state)} from {origin}")
    size = described(state).img_size
    for line in load_weights(model, state["model"], origin, resample=resample, img_size=size):
        report.say(line)
    if average is None:
        return None
    if isinstance(state.get("model_ema"), dict):
        load_weights(average.module, state["model_ema"], f"the average in {origin}", resample=resample, img_size=size)
    elif evaluating:
        return None
    else:
        average.module.load_state_dict(model.state_dict())
        report.warn(f"{origin} holds no averaged weights; the average starts again from the weights")
    return average


def load_place(run: TrainingRun, state: State, origin: str, cfg: Config, changes: Sequence[str]) -> None:
    """Load optimizer, place in the data, sums and random states; a file with weights alone starts a new run.

    Args:
        changes: of the order of the images, with which a run cannot continue inside an epoch.
    """
    place, start_epoch = run.place, cfg.run.start_epoch
    run.sums.values.zero_()  # a run that is rolled back has some
    if "optimizer" not in state or "epoch" not in state:
        run.move(start_epoch or 0)
        return
    then, now = _optimizer_name(state), cfg.optim.opt
    if then is not None and then.lower() != now.lower():
        raise UserError(
            f"{origin} was trained with --opt {then} and this run has --opt {now}",
            f"give --opt {then}, or start from its weights alone with --finetune {origin}",
        )
    try:
        load_optimizer(run.optimizer, run.model, state)
    except (ValueError, KeyError) as error:
        raise UserError(
            f"the optimizer's state in {origin} does not fit this run ({error})",
            "keep --opt, --layer-decay, --decay-a-log and what is frozen as they were, or start from its weights alone "
            f"with --finetune {origin}",
        ) from None
    take_turns(run, [(int(epoch), int(step)) for epoch, step in state.get("turns", ())])
    place.best_acc1 = float(state.get("best_acc1", NO_ACC1))
    epoch = int(state["epoch"])
    steps = run.curriculum.at(epoch).steps
    step = int(state.get("step", steps))
    trained = step >= state.get("steps", steps)  # all of the epoch, whatever its steps are in this run
    run.move(epoch, steps if trained else step)
    if trained and (state.get("evaluated", True) or not run.evaluated.due(epoch, run.epochs)):
        run.move(epoch + 1)
    if place.epoch == 0:  # nothing has been evaluated; earlier versions have 0 here
        place.best_acc1 = NO_ACC1
    if start_epoch is not None:
        run.move(start_epoch)
    if place.step and not trained and (state["steps"], state["global_batch"]) != (place.steps, run.global_batch):
        fix = "the data and --steps-per-epoch as they were"
        if state["global_batch"] != run.global_batch:
            fix = (
                "processes x --batch-size x --accum-steps as it was, "
                f"or give --global-batch-size {state['global_batch']}"
            )
        raise UserError(
            f"the checkpoint stands inside an epoch of {state['steps']} steps of {state['global_batch']} images, "
            f"this run has {place.steps} of {run.global_batch}",
            f"keep {fix}",
        )
    if 0 < place.step < place.steps:
        check_order(changes, str(place), place.epoch)
    elif changes:
        run.report.say(f"from epoch {place.epoch + (place.step > 0)} on in another order: {', '.join(changes)}")
    world, processes = run.world, state.get("processes", [])
    same = len(processes) == world.size
    if place.step and processes:  # sums are the run's, random states a process's own
        _load_sums(run, [p["sums"] for p in processes], state.get("accum_steps", _accum_steps(state)))
    if not same:
        return
    own = processes[world.rank]
    set_random_states(RandomStates(own["torch"], own["cuda"]), world.device)


def batch_changes(run: TrainingRun, state: State) -> tuple[int, int] | None:
    """Images of an update before the checkpoint and in this run, which follow from the number of processes too; None:
    they are the same, or the checkpoint does not say."""
    then, now = state.get("global_batch"), run.curriculum.at(int(state.get("epoch", 0))).global_batch
    return (then, now) if isinstance(then, int) and then != now else None


def take_turns(run: TrainingRun, turns: Sequence[tuple[int, int]]) -> None:
    """Learning rate and order of a run that was rolled back to these places: (epoch, step)."""
    if not turns and not run.turns:
        return
    run.turns = tuple(turns)
    run.rate.scale(FACTOR ** len(turns))
    for stage in run.curriculum.stages:
        detours = tuple(
            Detour(epoch, step * stage.accum_steps, number)
            for number, (epoch, step) in enumerate(turns, 1)
            if run.curriculum.at(epoch) is stage
        )
        if stage.loader.order.detours != detours:
            stage.loader.reorder(replace(stage.loader.order, detours=detours))


def _load_sums(run: TrainingRun, saved: list[list[float]], accum_steps: int) -> None:
    """The sums of the epoch so far, in float64 as they were.

    A sum has a term for each batch of each process. Where a step consists of more or fewer of them than it did, those
    from before the checkpoint weigh so much less or more.
    """
    then, now = len(saved) * accum_steps, run.world.size * run.accum_steps
    if then == now and len(saved) == run.world.size:
        sums = saved[run.world.rank]
    elif run.world.is_main:
        sums = [sum(values) * now / then for values in zip(*saved, strict=True)]
    else:
        return
    run.sums.values.copy_(torch.tensor(sums, dtype=torch.float64))


def _accum_steps(state: State) -> int:
    return int((state.get("config") or {}).get("optim", {}).get("accum_steps", 1))


def _optimizer_name(state: State) -> str | None:
    """What ``--opt`` was: in a checkpoint of ours, in one of the original code, or unknown."""
    name = (state.get("config") or {}).get("optim", {}).get("opt") or getattr(state.get("args"), "opt", None)
    return name if isinstance(name, str) else None


def collect(
    run: TrainingRun, *, evaluated: bool, classes: Sequence[str], images: str, config: dict[str, Any]
) -> State | None:
    """The state of the run as it is, copied to host memory; None on ranks but 0. Every process must call it.

    Args:
        evaluated: whether the finished epoch has been evaluated; not every epoch is.
        images: :attr:`~vimfast.data.source.Source.identity` of the training images.
    """
    world, place = run.world, run.place
    cpu, cuda = random_states(world.device)
    own = {"torch": cpu, "cuda": cuda, "sums": run.sums.values.tolist()}
    processes = dist.gather_objects(own)
    if not world.is_main:
        return None
    state: State = copied(
        {
            "model": run.model.state_dict(),
            "model_ema": run.average.module.state_dict() if run.average else None,
            "optimizer": run.optimizer.state_dict(),
            "epoch": place.epoch,
            "step": place.step,
            "steps": place.steps,
            "global_batch": run.global_batch,
            "accum_steps": run.accum_steps,
            "evaluated": evaluated,
            "best_acc1": place.best_acc1,
            "turns": [list(turn) for turn in run.turns],
            "processes": processes,
            "classes": list(classes),
            "images": images,
            "order_version": order_version(run.loader.order.computed),
            "config": config,
        }
    )
    return state


def write(state: State, there: Mark, folder: Path, *, keep: int, best: bool) -> None:
    """Write the state as the last checkpoint of a run folder.

    Args:
        there: the moment from which on the state is in host memory.
        keep: so many checkpoints, this one included.
        best: it is the best one too.
    """
    there.wait()
    if best:
        save_checkpoint(folder / BEST, state)
    save_last(folder, state, keep)
