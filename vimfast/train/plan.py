"""What a run is going to do, in lines that a person reads before it begins."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from vimfast.augment.recipe import described
from vimfast.config import Config
from vimfast.data.loader import Loader
from vimfast.data.mixed import in_stores
from vimfast.dist import World
from vimfast.errors import counted, duration
from vimfast.image_size import ImageSize
from vimfast.train.compiling import is_compiled
from vimfast.train.curriculum import TrainingStage
from vimfast.train.device import Trial, kernels
from vimfast.train.loaders import cache_settings
from vimfast.train.loop import EvaluationRun, Precision, TrainingRun
from vimfast.train.run_state import FACTOR

_IN_COLUMNS = ("input_size", "batch_size")  # of the table of stages


def plan(run: TrainingRun, cfg: Config, trials: Mapping[TrainingStage, Trial]) -> list[tuple[str, str]]:
    """(what, how) of a run that is ready to begin, on its first rank.

    Args:
        trials: of stages that were tried.
    """
    rows = [
        ("model", _model(run, cfg)),
        ("computes", _computes(run.world, run.precision, run.model, captured=run.train_step.captured)),
        ("trains on", _images(run, cfg)),
        ("cache", _cache(cfg)),
        ("stages", _stages(run)),
        ("augments by", _augmentation(run.stage.config, cfg.model.size) + _in_stage(run)),
        ("decodes by", _decoding(run.loader)),
        ("batch", _batch(run) + _in_stage(run)),
        ("learning rate", _rate(run, cfg)),
        ("length", _length(run, trials)),
        ("memory", _memory(run.world.device)),
        ("writes to", _output(run, cfg)),
    ]
    return [(what, how) for what, how in rows if how]


def plan_evaluation(run: EvaluationRun, cfg: Config) -> list[tuple[str, str]]:
    """(what, how) of an evaluation that is ready to begin."""
    loader, model = run.evaluated.loader, run.evaluated.models[""]
    source, batch = loader.source, loader.order.batch_size
    images = f"{counted(len(source), 'image')} of {len(source.classes)} classes in {cfg.data.data_path}"
    limit = f"; the images of {cfg.run.eval_steps} steps alone" if cfg.run.eval_steps else ""
    rows = [
        ("model", f"{_name(cfg)}, {sum(p.numel() for p in model.parameters()):,} parameters"),
        ("computes", _computes(run.world, run.precision, model, captured=run.evaluated.captures)),
        ("evaluates on", f"{images}, at {cfg.model.size} pixels{limit}"),
        ("cache", _cache(cfg)),
        ("decodes by", _decoding(loader)),
        ("batch", f"{counted(run.world.size, 'process')} x {counted(batch, 'image')}"),
        ("memory", _memory(run.world.device)),
    ]
    return [(what, how) for what, how in rows if how]


def _name(cfg: Config) -> str:
    """The model's, with the options that make it another one than its name says."""
    options = " ".join(f"{name}={value}" for name, value in cfg.model.model_kwargs.items())
    return f"{cfg.model.model} with {options}" if options else cfg.model.model


def _model(run: TrainingRun, cfg: Config) -> str:
    trained = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in run.model.parameters() if not p.requires_grad)
    averaged = f", EMA of decay {cfg.ema.model_ema_decay}" if run.average is not None else ""
    return f"{_name(cfg)}, {trained:,} parameters{(frozen and f' and {frozen:,} frozen ones') or ''}{averaged}"


def _computes(world: World, precision: Precision, model: nn.Module, *, captured: bool = False) -> str:
    explained = kernels(model, precision)
    parts = [f"{precision} on {world.size} x {world.device.type}", explained and f"kernels {explained}"]
    parts += ["compiled" if is_compiled(model) else "", "steps as a CUDA graph" if captured else ""]
    return ", ".join(filter(None, parts))


def _decoding(loader: Loader) -> str:
    return f"decoder {loader.settings.decoder}, threads {loader.settings.threads}"


def _cache(cfg: Config) -> str:
    """Of the shards of a store."""
    settings = cache_settings(cfg.data)
    if not in_stores(cfg.data.data_path):
        return ""
    if settings.size == 0:
        return "none: images are read from the store one by one"
    return f"{cfg.data.cache_size or 'all shards'} in {settings.path}"


def _images(run: TrainingRun, cfg: Config) -> str:
    source, val_source = run.loader.source, run.evaluated.loader.source
    images = f"{counted(len(source), 'image')} of {len(source.classes)} classes in {cfg.data.data_path}"
    every = cfg.run.eval_every
    often = f" after every {every} epochs" if every < run.epochs else " after the last epoch"
    when = often if every > 1 else ""
    return f"{images}, at {cfg.model.size} pixels; {len(val_source):,} to validate{when}"


def stage_table(
    run: TrainingRun, cfg: Config, trials: Mapping[TrainingStage, Trial]
) -> tuple[str, list[str], list[list[object]]]:
    """Title, columns and rows of the run's stages; as :func:`plan` has it."""
    stages, here, seconds = run.curriculum.stages, run.next_stage, run.train_step.seconds
    measured = len(trials) == len(stages)
    work = {stage: stage.updates * stage.work for stage in stages}
    rows: list[list[object]] = []
    for number, (stage, own) in enumerate(zip(stages, cfg.schedule.stages, strict=True), 1):
        changes = ", ".join(f"{name} {value}" for name, value in own.changes.items() if name not in _IN_COLUMNS)
        if measured:
            share = duration(stage.updates * stage.accum_steps * trials[stage].seconds)
        elif seconds is None:
            share = f"{work[stage] / sum(work.values()):.0%}"
        else:
            share = duration(work[stage] / here.work * here.accum_steps * seconds)
        epochs = f"{stage.epochs.start} to {stage.epochs[-1]}"
        parts = stage.accum_steps
        batch = f"{parts} x {stage.global_batch // parts:,}" if parts > 1 else f"{stage.global_batch:,}"
        memory = [f"{trials[stage].gib:.1f}"] if measured else []
        rows.append([number, epochs, stage.config.model.size, batch, f"{stage.updates:,}", changes, *memory, share])
    title = "stages; work is counted in pixels"
    if measured:
        title = "stages; GPU time and memory of their steps, GiB, as measured; loaders and evaluations come on top"
    elif seconds is not None:
        title = f"stages; GPU time as measured in stage {stages.index(here) + 1}, of others in proportion to pixels"
    columns = ["", "epochs", "pixels", "images", "steps", "changes", *(["memory"] if measured else [])]
    return title, [*columns, "work" if seconds is None else "GPU time"], rows


def _stages(run: TrainingRun) -> str:
    stages = run.curriculum.stages
    if len(stages) == 1:
        return ""
    return ", ".join(f"{_epochs(len(stage.epochs))} at {stage.config.model.size} pixels" for stage in stages)


def _epochs(count: int) -> str:
    return counted(count, "epoch")


def _in_stage(run: TrainingRun) -> str:
    stages = run.curriculum.stages
    return f" (stage {stages.index(run.stage) + 1} of {len(stages)})" if len(stages) > 1 else ""


def _augmentation(cfg: Config, final_size: ImageSize) -> str:
    return ", ".join(described(cfg, final_size)) or ("crops and flips alone" if cfg.data.hflip else "crops alone")


def _batch(run: TrainingRun) -> str:
    factors = [counted(run.world.size, "process"), counted(run.loader.order.batch_size, "image")]
    factors += [f"{run.accum_steps} batches"] if run.accum_steps > 1 else []
    return f"{counted(run.global_batch, 'image')} an update: {' x '.join(factors)}"


def _rate(run: TrainingRun, cfg: Config) -> str:
    optim, schedule = cfg.optim, cfg.schedule
    scaled = "" if optim.unscale_lr else f" = {optim.lr:g} x {run.global_batch:,} / 512"
    if len({stage.rate for stage in run.curriculum.stages}) > 1:
        scaled = " in the stage where it is highest"
    epochs = min(schedule.warmup_epochs, schedule.epochs - 1) if schedule.sched != "none" else 0
    warmup = f", {_epochs(epochs)} of warm-up" if epochs else ""
    lowered = f", x {FACTOR ** len(run.turns):g} after {len(run.turns)} rollbacks" if run.turns else ""
    lowered += f", x {optim.layer_decay:g} from each layer to the one before" if optim.layer_decay is not None else ""
    return f"{run.curriculum.peak_lr:.3g}{scaled}{lowered}, {optim.opt}, {schedule.sched}{warmup}"


def _length(run: TrainingRun, trials: Mapping[TrainingStage, Trial]) -> str:
    stages = run.curriculum.stages
    text = f"{_epochs(run.epochs)} of {counted(run.place.steps, 'step')}"
    if len(stages) > 1:
        text = f"{_epochs(run.epochs)}, {sum(stage.updates for stage in stages):,} steps"
    place = run.next_step or (run.epochs, 0)
    if run.train_step.seconds is not None:
        seconds = run.curriculum.updates_left(*place) * run.next_stage.accum_steps * run.train_step.seconds
        if len(trials) == len(stages):
            left = run.curriculum.left(*place)
            seconds = sum(left[stage] * stage.accum_steps * its.seconds for stage, its in trials.items())
        text += f"; at least {duration(seconds)} of GPU time for the steps"
    return text


def _memory(device: torch.device) -> str:
    if device.type != "cuda":
        return ""
    free, total = torch.cuda.mem_get_info(device)
    return f"{(total - free) / 2**30:.1f} of {total / 2**30:.1f} GiB of the GPU are in use"


def _output(run: TrainingRun, cfg: Config) -> str:
    if not cfg.run.output_dir:
        return "nothing: there is no --output_dir"
    if cfg.run.dry_run:
        return "nothing, because of --dry-run"
    every = [f"every {cfg.run.save_every} steps"] if cfg.run.save_every else []
    every += [f"every {cfg.run.save_minutes:g} minutes"] if cfg.run.save_minutes is not None else []
    return f"{cfg.run.output_dir}, checkpoints {', '.join([*every, 'after each epoch'])}"
