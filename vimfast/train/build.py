"""Puts a run together from its settings: one function for training, one for evaluation."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vimfast import dist
from vimfast.augment.crops import CentreCrop
from vimfast.augment.recipe import LARGEST_PADDED
from vimfast.checkpoint import ASIDE, CHECKPOINT, load_checkpoint, load_for_finetuning, set_aside
from vimfast.config import Batches, Config, DataConfig, ModelConfig, plan_batches
from vimfast.data.loader import Loader, LoaderSettings
from vimfast.data.order import Order
from vimfast.data.source import Source, open_source
from vimfast.data.views import Evaluation, training_view
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.models import create_model
from vimfast.processes.control import Control
from vimfast.train.continuity import check_classes, images_id, order_changes
from vimfast.train.folder import RunFolder, unwritable
from vimfast.train.freezing import freeze
from vimfast.train.gradients import GradientSum, copy_from_first
from vimfast.train.hooks import Beginning, Checkpoints, GradientHealth, NoCheckpoints, Progress, Records
from vimfast.train.loop import Evaluated, EvaluationRun, Hook, Place, Precision, TrainingRun
from vimfast.train.losses import Objective, build_teacher
from vimfast.train.mixing import Mixup
from vimfast.train.optim import LearningRate, build_ema, build_optimizer, peak_lr
from vimfast.train.report import Reporter
from vimfast.train.resume import Origin, load_models, load_origin, load_place
from vimfast.train.start_up import StartUp
from vimfast.train.step import TrainStep
from vimfast_kernels.tune import tune_once
from vimfast_kernels.tuning import read_again

Hooks = Callable[[TrainingRun], Sequence[Hook]]


def build(
    cfg: Config,
    world: World,
    control: Control | None = None,
    start_up: StartUp | None = None,
    hooks: Hooks | None = None,
) -> TrainingRun | EvaluationRun:
    """The run that the settings describe, ready to run.

    Args:
        control: says when to stop; without one the run goes to its end.
        start_up: has timed what came before.
        hooks: of the caller, added before those that save and record.
    """
    control, start_up = control or Control(world), start_up or StartUp()
    if cfg.run.eval:
        return build_evaluation(cfg, world, control, start_up)
    return build_training(cfg, world, control, start_up, hooks)


def build_evaluation(cfg: Config, world: World, control: Control, start_up: StartUp) -> EvaluationRun:
    """A run that evaluates a checkpoint, of its raw weights and of their average."""
    folder = Path(cfg.run.output_dir) if cfg.run.output_dir else None
    start = load_origin(cfg.run, cfg.finetune.finetune, folder)
    report = Reporter(None, world.is_main)
    control.say = report.say
    origin, state = (start.path, start.state) if start is not None else (None, None)
    source = open_source(cfg.data.data_path, "val")
    check_classes(source.classes, cfg.model.num_classes, state, str(origin), cfg.data.data_path)
    loader = _evaluation_loader(cfg, source, cfg.data.batch_size, world)
    start_up.done("data")
    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg.model, len(source.classes)).to(world.device)
    average = build_ema(cfg.ema, model)
    precision = choose_precision(cfg.run.amp, world.device, report)
    if state is not None:
        resample = cfg.finetune.pos_embed_resample
        average = load_models(state, str(origin), model, average, report, resample=resample, evaluating=True)
    models = {"": model, **({"ema_": average.module} if average is not None else {})}
    return EvaluationRun(Evaluated(models, loader, precision.amp, report, control), report, control, world)


def build_training(
    cfg: Config, world: World, control: Control, start_up: StartUp, hooks: Hooks | None = None
) -> TrainingRun:
    """A run of training, its kernels tuned, its step captured and its first batches begun."""
    if not cfg.run.output_dir:
        return _build_training(cfg, world, control, start_up, hooks, None)
    try:
        held = RunFolder(Path(cfg.run.output_dir), is_main=world.is_main)
    except UserError:
        control.folder = None  # its train.log is another run's
        raise
    try:
        return _build_training(cfg, world, control, start_up, hooks, held)
    except BaseException:
        held.release()
        raise


def _build_training(
    cfg: Config, world: World, control: Control, start_up: StartUp, hooks: Hooks | None, held: RunFolder | None
) -> TrainingRun:
    folder = held.path if held is not None else None
    start = load_origin(cfg.run, cfg.finetune.finetune, folder)
    report = Reporter(folder, world.is_main)
    control.say = report.say
    origin, state = (start.path, start.state) if start is not None else (None, None)
    batches = plan_batches(cfg, world.size)
    val_source = open_source(cfg.data.data_path, "val")
    classes = val_source.classes
    check_classes(classes, cfg.model.num_classes, state, str(origin), cfg.data.data_path)
    val_loader = _evaluation_loader(cfg, val_source, batches.batch_size, world)
    start_up.done("data")

    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg.model, len(classes))
    check_patches(model, cfg.model.input_size)
    _start_from(model, cfg, cfg.finetune.finetune if origin is None else "", report)
    model.to(world.device)
    average = build_ema(cfg.ema, model)
    precision = choose_precision(cfg.run.amp, world.device, report)
    if state is not None:
        average = load_models(state, str(origin), model, average, report, resample=None, evaluating=False)

    source = open_source(cfg.data.data_path, "train")
    if list(source.classes) != list(classes):
        raise UserError(
            f"train has {len(source.classes)} classes and val {len(classes)}, or with other names; "
            f"check them with python -m vimfast.check_data {cfg.data.data_path}"
        )
    loader = _training_loader(cfg, source, batches, world)
    global_batch = batches.batch_size * batches.accum_steps * world.size
    place = Place(steps=loader.steps // batches.accum_steps)
    teacher = build_teacher(cfg.distill, len(classes), cfg.model.input_size)
    teacher = None if teacher is None else teacher.to(world.device)
    objective = Objective(cfg.distill, cfg.mix.bce_loss, teacher, precision.amp)
    optimizer = build_optimizer(cfg.optim, model, peak_lr(cfg.optim, global_batch))
    rate = LearningRate(cfg.schedule, optimizer, place.steps)
    torch.manual_seed(cfg.run.seed + world.rank)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    train_step = TrainStep(
        model,
        optimizer,
        objective,
        amp=precision.amp,
        average=average,
        gradients=GradientSum(trained) if world.size > 1 else None,
        clip_grad=cfg.optim.clip_grad,
        accum_steps=batches.accum_steps,
    )
    models = {"": model, **({"ema_": average.module} if average is not None else {})}
    run = TrainingRun(
        place=place,
        epochs=cfg.schedule.epochs,
        accum_steps=batches.accum_steps,
        model=model,
        average=average,
        optimizer=optimizer,
        loader=loader,
        mixup=Mixup(cfg.mix, len(classes), cfg.run.seed, world.rank),
        objective=objective,
        train_step=train_step,
        rate=rate,
        evaluated=Evaluated(models, val_loader, precision.amp, report, control),
        precision=precision,
        report=report,
        control=control,
        world=world,
        folder=held,
    )
    images = images_id(source, cfg.data.data_path)
    if state is not None:
        changes = order_changes(state, cfg, images)
        load_place(run, state, str(origin), cfg, global_batch, changes)
    elif cfg.run.start_epoch is not None:
        place.epoch = cfg.run.start_epoch
    if cfg.model.torch_compile or os.environ.get("TORCH_COMPILE") == "1":
        model.compile()
    for module in models.values():
        copy_from_first(module)
    start_up.done("model")

    control.place = lambda: str(place)
    kept = f"saving the place in {folder / CHECKPOINT}" if folder else "ending; no --output_dir, no saving"
    control.promise = f"finishing the step, then {kept}"
    health = GradientHealth(run, cfg.optim.skip_limit, folder)
    extra = {
        "keep": cfg.run.keep_checkpoints,
        "global_batch": global_batch,
        "classes": classes,
        "images": images,
        "config": cfg.to_dict(),
    }
    run.hooks = [
        Beginning(start_up, report),
        Progress(run, health, cfg.run.log_every),
        *(hooks(run) if hooks is not None else ()),
        Records(run),
        Checkpoints(run, health, folder, cfg.run.save_every, extra) if folder else NoCheckpoints(run),
    ]
    _prepare_device(run, cfg, batches, start_up)
    _introduce(run, cfg, source, val_source, global_batch)
    if state is not None and (changed := cfg.changed_since(state.get("config") or {})):
        report.table("changed since the checkpoint", ("setting", "then", "now"), changed)
    if held is not None:
        _take_over(held, cfg, start, place, report)
    start_up.done("capture")
    return run


# Data


def _evaluation_loader(cfg: Config, source: Source, batch_size: int, world: World) -> Loader:
    data, size = cfg.data, cfg.model.input_size
    order = Order(
        samples=len(source),
        batch_size=data.eval_batch_size or batch_size,
        world=world.size,
        rank=world.rank,
        seed=cfg.run.seed,
        shuffle=False,
        drop_last=False,
        limit=cfg.run.eval_steps,
    )
    # The original evaluates small inputs as they are; images of another size are resized by their short side.
    crop = CentreCrop(1.0 if size <= LARGEST_PADDED else data.eval_crop_ratio)
    return Loader(source, Evaluation(order, world.device, size, crop), _loader_settings(data))


def _training_loader(cfg: Config, source: Source, batches: Batches, world: World) -> Loader:
    data, accum = cfg.data, batches.accum_steps
    order = Order(
        samples=len(source),
        batch_size=batches.batch_size,
        world=world.size,
        rank=world.rank,
        seed=cfg.run.seed,
        repeats=3 if data.repeated_aug else 1,
        neighbours=data.repeated_aug_on == "one-rank",
        node=world.neighbours if data.repeated_aug and data.repeated_aug_on == "all-ranks" else 1,
        bounds=source.bounds() if data.order == "window" else None,
        window=data.order_window,
    )
    updates = order.steps // accum  # whole ones only
    if updates == 0 < order.steps:
        count = f"{order.steps} batch{'es' * (order.steps != 1)}"
        raise UserError(f"--accum-steps {accum} is more than the {count} of an epoch; lower it")
    limit = cfg.run.steps_per_epoch
    order = replace(order, limit=accum * (updates if limit is None else min(limit, updates)))
    view = training_view(
        order,
        world.device,
        cfg.augment,
        size=cfg.model.input_size,
        scale=data.scale,
        ratio=data.ratio,
        flip=data.hflip,
        interpolation=data.train_interpolation,
        group=world.host,
    )
    return Loader(source, view, _loader_settings(data))


def _loader_settings(data: DataConfig) -> LoaderSettings:
    return LoaderSettings(data.decoder, data.num_workers, data.prefetch, data.readahead, on_bad_image=data.on_bad_image)


# Model


def build_model(cfg: ModelConfig, num_classes: int) -> nn.Module:
    """The model, on the CPU, with initial weights."""
    model: nn.Module = create_model(
        cfg.model,
        num_classes=num_classes,
        img_size=cfg.input_size,
        drop_rate=cfg.drop,
        drop_path_rate=cfg.drop_path,
        scan_backend=cfg.scan_backend,
        **cfg.options(),
    )
    if cfg.use_checkpoint:
        switch = getattr(model, "set_grad_checkpointing", None)
        if switch is None:
            raise UserError(f"{cfg.model} cannot recompute its activations; drop --use-checkpoint")
        switch()
    return model


def check_patches(model: nn.Module, size: int) -> None:
    """Whether the patches cover the whole image, where a model is made of patches.

    Raises:
        UserError: some rows and columns are in none, and the model would never see them.
    """
    conv = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(conv, nn.Conv2d):
        return
    patch, stride = conv.kernel_size[0], conv.stride[0]
    if rest := (size + 2 * int(conv.padding[0]) - patch) % stride:
        raise UserError(
            f"--input-size {size} is not a whole number of patches of {patch} pixels every {stride}: the last {rest} "
            f"rows and columns would never be seen",
            f"give {size - rest} or {size - rest + stride}",
        )


def choose_precision(amp: bool, device: torch.device, report: Reporter) -> Precision:
    """bf16 where it is wanted and the GPU has it; else a context that does nothing. Sets cuDNN's flags on a GPU."""
    on_gpu = device.type == "cuda"
    enabled = amp and on_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if on_gpu:
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32; torch leaves this one on
        if amp and not enabled:
            report.warn("this GPU has no bf16, so the run is in fp32; --no_amp says so without this line")
    # A cache of cast weights would outlive the step that it was made in, in a CUDA graph's memory.
    context = torch.autocast(device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)
    return Precision(context, torch.bfloat16 if enabled else torch.float32)


def _start_from(model: nn.Module, cfg: Config, finetune: str, report: Reporter) -> None:
    """Weights of another run, if there are any, and which of them are not to be trained."""
    if finetune:
        weights = load_checkpoint(Path(finetune))["model"]
        for line in load_for_finetuning(model, weights, finetune, resample=cfg.finetune.pos_embed_resample):
            report.say(line)
    if line := freeze(model, cfg.finetune):
        report.say(line)


def _kernels(run: TrainingRun) -> str:
    """Which run; empty for a model that has no choice of them."""
    explain = getattr(run.model, "kernels", None)
    return "" if explain is None else explain(run.precision.dtype)


# Before the first step


def _prepare_device(run: TrainingRun, cfg: Config, batches: Batches, start_up: StartUp) -> None:
    """Tune kernels, begin the first batches, capture the step, and choose the decoder by what it takes."""
    if run.world.device.type == "cuda":
        _tune(run)
        start_up.done("kernels")
    run.control.doing("preparing the training step")
    run.loader.begin(run.place.epoch, run.place.step * run.accum_steps)
    if run.world.device.type == "cuda" and cfg.model.cuda_graph and getattr(run.model, "capturable", False):
        with run.memory():
            _capture(run, batches.batch_size, cfg.model.input_size)
        if all(dist.gather_objects(run.train_step.captured)):
            run.train_step.time_replays()
            run.loader.expect(min(dist.gather_objects(run.train_step.seconds)))
        else:  # graphs that hold a collective are for all processes, or for none
            run.train_step.forget()


def _tune(run: TrainingRun) -> None:
    """Once for a kind of GPU: a process of each host times the kernels, the others wait and read what it found."""
    if _kernels(run) == "gluon" and run.world.local_rank == 0:
        run.control.doing("tuning kernels")
        tune_once(torch.cuda.current_device(), run.report.say)
    else:
        run.control.doing("waiting for rank 0 of its host to tune kernels")
    dist.barrier()
    read_again()


def _capture(run: TrainingRun, batch_size: int, size: int) -> None:
    """Record the training step as a CUDA graph."""
    device = run.world.device
    images = torch.zeros(batch_size, 3, size, size, device=device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=device)
    run.model.train()
    try:
        images, targets = run.mixup(images, labels, 0)
        run.train_step.capture(run.objective.prepare(images), targets)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        why = " ".join(str(error).split())
        run.report.warn(f"the step cannot be a CUDA graph ({why[:200]}); --no-cuda-graph avoids this warning")


def _introduce(run: TrainingRun, cfg: Config, source: Source, val_source: Source, global_batch: int) -> None:
    world, decoding, kernels = run.world, run.loader.settings, _kernels(run)
    parameters = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    run.report.say(
        f"{cfg.model.model}: {parameters:,} parameters{kernels and f', kernels {kernels}'}, "
        f"{run.precision} on {world.size} x {world.device.type}"
        f"{', steps as a CUDA graph' if run.train_step.captured else ''}; "
        f"{len(source):,} images of {len(source.classes)} classes "
        f"(decoder {decoding.decoder}, threads {decoding.threads}), "
        f"{len(val_source):,} to validate; {run.place.steps} steps an epoch of {global_batch} images, "
        f"learning rate {peak_lr(cfg.optim, global_batch):.3g}"
    )
    warmup, epochs = cfg.schedule.warmup_epochs, cfg.schedule.epochs
    if warmup >= epochs and cfg.schedule.sched != "none":
        run.report.warn(f"--warmup-epochs {warmup} leaves nothing of --epochs {epochs}; warming up for {epochs - 1}")
    if run.place.epoch or run.place.step:
        run.report.say(f"resuming at {run.place}")


def _take_over(held: RunFolder, cfg: Config, start: Origin | None, place: Place, report: Reporter) -> None:
    """Nothing can refuse the run any more: from here on its folder is about this run.

    The checkpoint that it resumes from becomes the last one, the settings are its own, the records those before it.
    """
    if start is not None:
        for note in start.notes:
            report.warn(f"{note}; resuming from {start.path}, the one before")
    try:
        for path in set_aside(held.path, start.path) if start is not None and report.active else ():
            report.say(f"{path} is not used any more, and is kept as {held.path / ASIDE}")
        report.records_from(place.epoch)
    except OSError as error:
        raise unwritable(held.path, error) from None
    held.save_config(cfg)
