"""Puts a run together from its settings: one function for training, one for evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch.optim import Optimizer

from vimfast.checkpoint import ASIDE, CHECKPOINT, set_aside
from vimfast.config import Config, plan_batches
from vimfast.data.loader import Loader
from vimfast.data.views import Stages
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.processes.control import Control
from vimfast.train.boards import WandB, check_boards
from vimfast.train.continuity import order_changes
from vimfast.train.device import prepare_device
from vimfast.train.folder import RunFolder, unwritable
from vimfast.train.gradients import GradientSum, copy_from_first
from vimfast.train.health import GradientHealth, LossHealth
from vimfast.train.hooks import Beginning, Progress, Records
from vimfast.train.loaders import open_training, open_validation
from vimfast.train.loop import Evaluated, EvaluationRun, Hook, Place, TrainingRun
from vimfast.train.losses import Objective
from vimfast.train.mixing import Mixup
from vimfast.train.model import Models, build_models
from vimfast.train.optim import LearningRate, build_optimizer, peak_lr
from vimfast.train.page import RunPage
from vimfast.train.plan import plan
from vimfast.train.report import Reporter
from vimfast.train.rollback import Rollback
from vimfast.train.run_state import Origin, load_origin, load_place
from vimfast.train.saving import Checkpoints, NoCheckpoints
from vimfast.train.start_up import StartUp
from vimfast.train.step import TrainStep

Hooks = Callable[[TrainingRun], Sequence[Hook]]


def build(
    cfg: Config,
    world: World,
    control: Control | None = None,
    start_up: StartUp | None = None,
    hooks: Hooks | None = None,
    stage: Stages | None = None,
) -> TrainingRun | EvaluationRun:
    """The run that the settings describe, ready to run.

    Args:
        control: says when to stop; without one the run goes to its end.
        start_up: has timed what came before.
        hooks: of the caller, added before those that save and record.
        stage: input size and augmentation of each epoch of training; None: the settings', in all of them.
    """
    control, start_up = control or Control(world), start_up or StartUp()
    if cfg.run.eval:
        return build_evaluation(cfg, world, control, start_up)
    return build_training(cfg, world, control, start_up, hooks, stage)


def build_evaluation(cfg: Config, world: World, control: Control, start_up: StartUp) -> EvaluationRun:
    """A run that evaluates a checkpoint, of its raw weights and of their average."""
    folder = Path(cfg.run.output_dir) if cfg.run.output_dir else None
    start = load_origin(cfg.run, cfg.finetune.finetune, folder)
    report = Reporter(None, world.is_main)
    control.say = report.say
    loader = open_validation(cfg, cfg.data.batch_size, world, start, report)
    start_up.done("data")
    models = build_models(cfg, len(loader.source.classes), start, world.device, report)
    evaluated = Evaluated(models.evaluated, loader, models.precision.amp, report, control)
    return EvaluationRun(evaluated, report, control, world)


def build_training(
    cfg: Config,
    world: World,
    control: Control,
    start_up: StartUp,
    hooks: Hooks | None = None,
    stage: Stages | None = None,
) -> TrainingRun:
    """A run of training, its kernels tuned, its step captured and its first batches begun."""
    check_boards(cfg.run)
    if not cfg.run.output_dir or cfg.run.dry_run:
        return _build_training(cfg, world, control, start_up, hooks, stage, None)
    try:
        held = RunFolder(Path(cfg.run.output_dir), is_main=world.is_main)
    except UserError:
        control.folder = None  # its train.log is another run's
        raise
    try:
        return _build_training(cfg, world, control, start_up, hooks, stage, held)
    except BaseException:
        held.release()
        raise


def _build_training(
    cfg: Config,
    world: World,
    control: Control,
    start_up: StartUp,
    hooks: Hooks | None,
    stage: Stages | None,
    held: RunFolder | None,
) -> TrainingRun:
    folder = None if held is None else held.path
    start = load_origin(cfg.run, cfg.finetune.finetune, Path(cfg.run.output_dir) if cfg.run.output_dir else None)
    report = Reporter(folder, world.is_main)
    control.say = report.say

    batches = plan_batches(cfg, world.size)
    val_loader = open_validation(cfg, batches.batch_size, world, start, report)
    loader = open_training(cfg, batches, world, val_loader.source.classes, stage, report)
    start_up.done("data")

    sizes = {loader.view.side(epoch) for epoch in range(cfg.schedule.epochs)}
    models = build_models(cfg, len(loader.source.classes), start, world.device, report, sizes)
    run = _assemble(cfg, batches.accum_steps, loader, val_loader, models, world, control, report, held)
    images = loader.source.identity
    _resume(run, cfg, start, images)
    start_up.done("model")

    control.place = lambda: str(run.place)
    kept = f"saving the place in {folder / CHECKPOINT}" if folder else "ending; no --output_dir, no saving"
    control.promise = f"finishing the step, then {kept}"
    run.hooks = _hooks(run, cfg, images, start_up, hooks)
    prepare_device(run, cfg.model, start_up)
    _introduce(run, cfg, start)
    if held is not None:
        _take_over(held, cfg, start, run.place, report)
    start_up.done("capture")
    return run


def _assemble(
    cfg: Config,
    accum_steps: int,
    loader: Loader,
    val_loader: Loader,
    models: Models,
    world: World,
    control: Control,
    report: Reporter,
    held: RunFolder | None,
) -> TrainingRun:
    """A run at its beginning, without hooks."""
    num_classes = len(loader.source.classes)
    objective = Objective(cfg.distill, cfg.mix.bce_loss, models.teacher, models.precision.amp)
    optimizer = build_optimizer(cfg.optim, models.model, peak_lr(cfg.optim, loader.order.global_batch * accum_steps))
    place = Place(steps=loader.steps // accum_steps)
    rate = LearningRate(cfg.schedule, optimizer, place.steps)
    torch.manual_seed(cfg.run.seed + world.rank)
    return TrainingRun(
        place=place,
        epochs=cfg.schedule.epochs,
        accum_steps=accum_steps,
        model=models.model,
        average=models.average,
        optimizer=optimizer,
        loader=loader,
        mixup=Mixup(cfg.mix, num_classes, cfg.run.seed, world.rank),
        objective=objective,
        train_step=_train_step(models, optimizer, objective, cfg.optim.clip_grad, accum_steps, world.size),
        rate=rate,
        evaluated=Evaluated(models.evaluated, val_loader, models.precision.amp, report, control),
        precision=models.precision,
        report=report,
        control=control,
        world=world,
        folder=held,
    )


def _train_step(
    models: Models,
    optimizer: Optimizer,
    objective: Objective,
    clip_grad: float | None,
    accum_steps: int,
    processes: int,
) -> TrainStep:
    trained = {name: p for name, p in models.model.named_parameters() if p.requires_grad}
    return TrainStep(
        models.model,
        optimizer,
        objective,
        amp=models.precision.amp,
        average=models.average,
        gradients=GradientSum(trained) if processes > 1 else None,
        clip_grad=clip_grad,
        accum_steps=accum_steps,
    )


def _resume(run: TrainingRun, cfg: Config, start: Origin | None, images: str) -> None:
    """Bring the run to where it begins, with the same weights on all processes."""
    if start is not None:
        load_place(run, start.state, str(start.path), cfg, order_changes(start.state, cfg, images))
    elif cfg.run.start_epoch is not None:
        run.place.epoch = cfg.run.start_epoch
    if cfg.model.torch_compile or os.environ.get("TORCH_COMPILE") == "1":
        run.model.compile()
    for module in run.evaluated.models.values():
        copy_from_first(module)


def _hooks(run: TrainingRun, cfg: Config, images: str, start_up: StartUp, more: Hooks | None) -> list[Hook]:
    folder = None if run.folder is None else run.folder.path
    health = GradientHealth(run, cfg.optim.skip_limit, folder)
    losses = LossHealth(run, raises=cfg.optim.on_divergence == "rollback")
    if cfg.optim.on_divergence == "rollback":
        run.recover = Rollback(run, cfg, Path(cfg.run.output_dir), losses)
    saving: list[Hook] = [NoCheckpoints(run)]
    if folder is not None:
        extra = {"classes": run.loader.source.classes, "images": images, "config": cfg.to_dict()}
        saving = [RunPage(run, folder, cfg.data.data_path), Checkpoints(run, health, folder, cfg.run, extra)]
    return [
        Beginning(start_up, run.report),
        Progress(run, health, losses, cfg.run.log_every),
        *(more(run) if more is not None else ()),
        Records(run, cfg.run.csv),
        *saving,
    ]


def _introduce(run: TrainingRun, cfg: Config, start: Origin | None) -> None:
    run.plan = plan(run, cfg) if run.report.active else []
    for what, how in run.plan:
        run.report.say(f"{what:15}{how}")
    warmup, epochs = cfg.schedule.warmup_epochs, cfg.schedule.epochs
    if warmup >= epochs and cfg.schedule.sched != "none":
        run.report.warn(f"--warmup-epochs {warmup} leaves nothing of --epochs {epochs}; warming up for {epochs - 1}")
    if run.place.epoch or run.place.step:
        run.report.say(f"resuming at {run.place}")
    if start is not None and (changed := cfg.changed_since(start.state.get("config") or {})):
        run.report.table("changed since the checkpoint", ("setting", "then", "now"), changed)


def _take_over(held: RunFolder, cfg: Config, start: Origin | None, place: Place, report: Reporter) -> None:
    """Nothing can refuse the run any more: from here on its folder is about this run.

    The checkpoint that it resumes from becomes the last one, the settings are its own, the records those before it.
    """
    if start is not None:
        for note in start.notes:
            report.warn(f"{note}; resuming from {start.path}, the newest intact one")
    try:
        for path in set_aside(held.path, start.path) if start is not None and report.active else ():
            report.say(f"{path} is not used any more, and is kept as {held.path / ASIDE}")
        report.records_from(place.epoch)
    except OSError as error:
        raise unwritable(held.path, error) from None
    held.save_config(cfg)
    if cfg.run.wandb and report.active:
        report.add("Weights & Biases' file", WandB(held.path, cfg.to_dict(), resumed=place.epoch > 0 or place.step > 0))
