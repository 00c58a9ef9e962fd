"""Puts a run together from its settings: one function for training, one for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from vimfast.checkpoint import ASIDE, CHECKPOINT, Loaded, set_aside
from vimfast.config import Config, plan_batches, staged
from vimfast.config.choices import AUTO
from vimfast.data.loader import Loader
from vimfast.data.source import Source
from vimfast.data.views import Stages
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.image_size import ImageSize
from vimfast.processes.control import Control
from vimfast.train.batch_size import with_batch_size
from vimfast.train.boards import WandB, check_boards
from vimfast.train.compiling import captures, compiles
from vimfast.train.continuity import computed_as_in, order_changes
from vimfast.train.curriculum import Curriculum, TrainingStage
from vimfast.train.depth import StochasticDepth
from vimfast.train.device import EvaluationAhead, StageEntry, Trial, prepare_device, try_stages
from vimfast.train.folder import RunFolder, check_folder, unwritable
from vimfast.train.gradients import copy_from_first
from vimfast.train.health import GradientHealth, LossHealth
from vimfast.train.hooks import Beginning, Progress, Records
from vimfast.train.loaders import fit_order, open_training, open_training_source, open_validation
from vimfast.train.loop import Evaluated, EvaluationRun, Hook, Place, TrainingRun
from vimfast.train.losses import Objective
from vimfast.train.mixing import build_mixup
from vimfast.train.model import Models, build_models, build_step
from vimfast.train.optim import LearningRate, build_optimizer, peak_lr
from vimfast.train.page import RunPage
from vimfast.train.plan import plan, plan_evaluation, stage_table
from vimfast.train.report import Reporter
from vimfast.train.rollback import Rollback
from vimfast.train.run_state import batch_changes, load_origin, load_place
from vimfast.train.saving import Checkpoints, NoCheckpoints
from vimfast.train.start_up import StartUp
from vimfast.train.waiting import DataWaits

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
    """A run that evaluates a checkpoint, of its trained weights and of their average."""
    folder = Path(cfg.run.output_dir) if cfg.run.output_dir else None
    start = load_origin(cfg.run, cfg.finetune.finetune, folder)
    report = Reporter(None, world.is_main)
    control.say, control.let_go = report.say, report.let_go
    for note in start.notes if start is not None else ():
        report.warn(note)
    cfg = with_batch_size(cfg, world, start, (), report)
    assert cfg.data.batch_size != AUTO
    loader = open_validation(cfg, cfg.data.batch_size, world, start, report)
    start_up.done("data")
    models = build_models(cfg, len(loader.source.classes), start, world.device, report)
    captured = captures(models.model, cfg.model, world.device)
    evaluated = Evaluated(models.evaluated, loader, models.precision.amp, report, control, captured)
    run = EvaluationRun(evaluated, models.precision, report, control, world)
    _print(plan_evaluation(run, cfg), report)
    return run


def build_training(
    cfg: Config,
    world: World,
    control: Control,
    start_up: StartUp,
    hooks: Hooks | None = None,
    stage: Stages | None = None,
) -> TrainingRun:
    """A run of training, its kernels tuned, its step captured and its first batches begun."""
    if cfg.run.output_dir:
        check_folder(Path(cfg.run.output_dir))
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
    control.say, control.let_go = report.say, report.let_go

    if stage is not None and cfg.schedule.stages:
        raise UserError("the settings have stages, and the caller a function from an epoch to a stage", "drop one")
    control.doing("looking for the largest batch")
    cfg = with_batch_size(cfg, world, start, _sizes(cfg, stage), report)
    control.doing("building the run")
    val_loader = open_validation(cfg, plan_batches(cfg, world.size).batch_size, world, start, report)
    source = open_training_source(cfg, val_loader.source.classes)
    cfg = fit_order(cfg, source, report)
    # One process saves its place when it cannot have an image. Of several, the others are inside the step by then.
    stop = control.stop_for if world.size > 1 else None
    computed = computed_as_in(None if start is None else start.state)
    curriculum = _curriculum(cfg, source, world, stage, report, stop, computed)
    start_up.done("data")

    rates = {own.config.model.drop_path for own in curriculum.stages}
    most = max(rates)
    models = build_models(cfg, len(source.classes), start, world.device, report, _sizes(cfg, stage), most)
    depth = StochasticDepth(models.model, most) if len(rates) > 1 else None
    run = _assemble(cfg, curriculum, val_loader, models, world, control, report, held)
    images = source.identity
    _resume(run, cfg, start, images)
    start_up.done("model")

    control.place = lambda: str(run.place)
    kept = f"saving the place in {folder / CHECKPOINT}" if folder else "ending; no --output_dir, no saving"
    control.promise = f"finishing the step, then {kept}"
    entry = StageEntry(run, capture=captures(run.model, cfg.model, world.device), depth=depth)
    run.hooks = [entry, *_hooks(run, cfg, images, start_up, hooks)]
    prepare_device(run, entry, start_up)
    _introduce(run, cfg, start, try_stages(run, entry) if cfg.run.dry_run else {})
    if held is not None:
        _take_over(held, cfg, start, run.place, report)
    start_up.done("capture")
    return run


def _sizes(cfg: Config, stage: Stages | None) -> set[ImageSize]:
    """Of the images that are trained on."""
    if stage is None:
        return {own.config.model.size for own in staged(cfg)}
    return {ImageSize.of(stage(epoch).size) for epoch in range(cfg.schedule.epochs)}


def _curriculum(
    cfg: Config,
    source: Source,
    world: World,
    stage: Stages | None,
    report: Reporter,
    stop: Callable[[UserError], None] | None,
    computed: bool | None,
) -> Curriculum:
    """What each epoch trains with; rates are shares of the highest that a stage has at its peak."""
    final_size, parts = cfg.model.size, []
    mixing = build_mixup(cfg.mix, source, cfg.run.seed, world.rank)
    for epochs, own in staged(cfg):
        batches = plan_batches(own, world.size)
        loader = open_training(
            source, own, batches, world, report, final_size=final_size, stage=stage, stop=stop, computed=computed
        )
        mixup = mixing.as_in(own.mix)
        parts.append(TrainingStage(epochs, own, loader, mixup, batches.accum_steps))
    peaks = [peak_lr(part.config.optim, part.global_batch) for part in parts]
    highest = max(peaks)
    shares = [1.0 if peak == highest else peak / highest for peak in peaks]
    return Curriculum([replace(part, rate=share) for part, share in zip(parts, shares, strict=True)], highest)


def _assemble(
    cfg: Config,
    curriculum: Curriculum,
    val_loader: Loader,
    models: Models,
    world: World,
    control: Control,
    report: Reporter,
    held: RunFolder | None,
) -> TrainingRun:
    """A run at its beginning, without hooks."""
    objective = Objective(cfg.distill, cfg.mix.bce_loss, models.teacher, models.precision.amp)
    optimizer = build_optimizer(cfg.optim, models.model, curriculum.peak_lr)
    rate = LearningRate(cfg.schedule, optimizer, curriculum.stages[-1].steps)
    accum_steps = curriculum.at(0).accum_steps
    torch.manual_seed(cfg.run.seed + world.rank)
    return TrainingRun(
        place=Place(steps=curriculum.at(0).steps),
        epochs=cfg.schedule.epochs,
        curriculum=curriculum,
        model=models.model,
        average=models.average,
        optimizer=optimizer,
        objective=objective,
        train_step=build_step(models, optimizer, objective, cfg.optim.clip_grad, accum_steps, world.size),
        rate=rate,
        evaluated=Evaluated(
            models.evaluated,
            val_loader,
            models.precision.amp,
            report,
            control,
            captures(models.model, cfg.model, world.device),
            every=cfg.run.eval_every,
        ),
        precision=models.precision,
        report=report,
        control=control,
        world=world,
        folder=held,
    )


def _resume(run: TrainingRun, cfg: Config, start: Loaded | None, images: str) -> None:
    """Bring the run to where it begins, with the same weights on all processes."""
    if start is not None:
        load_place(run, start.state, str(start.path), cfg, order_changes(start.state, cfg, images))
    elif cfg.run.start_epoch is not None:
        run.move(cfg.run.start_epoch)
    if compiles(run.model, cfg.model, run.world.device):
        run.model.compile(dynamic=False)  # for the batches of each stage
    for module in run.evaluated.models.values():
        copy_from_first(module)


def _hooks(run: TrainingRun, cfg: Config, images: str, start_up: StartUp, more: Hooks | None) -> list[Hook]:
    folder = None if run.folder is None else run.folder.path
    health = GradientHealth(run, cfg.optim.skip_limit, folder)
    losses = LossHealth(run, raises=cfg.optim.on_divergence == "rollback")
    if cfg.optim.on_divergence == "rollback":
        run.recover = Rollback(run, cfg, Path(cfg.run.output_dir), losses)
    saving: list[Hook] = [NoCheckpoints(run)]
    if run.folder is not None:
        extra = {"classes": run.loader.source.classes, "images": images, "config": cfg.to_dict()}
        page = RunPage(run, run.folder, cfg.data.data_path)
        saving = [page, Checkpoints(run, health, run.folder, cfg.run, extra)]
    return [
        Beginning(start_up, run.report),
        Progress(run, health, losses, DataWaits(run, cfg.data), cfg.run.log_every),
        EvaluationAhead(run),
        *(more(run) if more is not None else ()),
        Records(run, cfg.run.csv),
        *saving,
    ]


def _print(rows: Sequence[tuple[str, str]], report: Reporter) -> None:
    for what, how in rows:
        report.row(what, how)


def _introduce(run: TrainingRun, cfg: Config, start: Loaded | None, trials: Mapping[TrainingStage, Trial]) -> None:
    for note in start.notes if start is not None else ():
        run.report.warn(note)
    run.plan = plan(run, cfg, trials) if run.report.active else []
    _print(run.plan, run.report)
    if len(run.curriculum.stages) > 1:
        run.report.table(*stage_table(run, cfg, trials))
    warmup, epochs = cfg.schedule.warmup_epochs, cfg.schedule.epochs
    if warmup >= epochs and cfg.schedule.sched != "none":
        run.report.warn(f"--warmup-epochs {warmup} leaves nothing of --epochs {epochs}; warming up for {epochs - 1}")
    if run.place.epoch >= run.epochs:
        done = f"all epochs are done ({run.place.epoch} of {run.epochs})"
        if run.place.step:
            done = f"the run stands at {run.place}, beyond --epochs {run.epochs}"
        evaluates = f", and --eval --resume {start.path} evaluates it" if start is not None else ""
        run.report.say(f"{done}; a larger --epochs continues the run{evaluates}")
    elif run.place.step == run.place.steps:
        run.report.say(f"all steps of epoch {run.place.epoch} are trained; its evaluation is next")
    elif run.place.epoch or run.place.step:
        run.report.say(f"resuming at {run.place}")
    if start is None:
        return
    changed: list[tuple[str, object, object]] = [*cfg.changed_since(start.state.get("config") or {})]
    batches = batch_changes(run, start.state)
    changed += [("images an update, on all processes", *batches)] if batches else []
    if changed:
        run.report.table("changed since the checkpoint", ("setting", "then", "now"), changed)
    if batches:
        scaled = "" if cfg.optim.unscale_lr else ", and with them the learning rate,"
        run.report.say(f"--global-batch-size {batches[0]} keeps the updates{scaled} as they were")


def _take_over(held: RunFolder, cfg: Config, start: Loaded | None, place: Place, report: Reporter) -> None:
    """Nothing can refuse the run any more: from here on its folder is about this run.

    The checkpoint that it resumes from becomes the last one, the settings are its own, the records those before it.
    """
    try:
        for path in set_aside(held.path, start.path) if start is not None and report.active else ():
            report.say(f"{path} is not used any more, and is kept as {held.path / ASIDE}")
        report.records_from(place.epoch)
    except OSError as error:
        raise unwritable(held.path, error) from None
    held.save_config(cfg)
    if cfg.run.wandb and report.active:
        report.add("Weights & Biases' file", WandB(held.path, cfg.to_dict(), resumed=place.epoch > 0 or place.step > 0))
