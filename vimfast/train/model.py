"""The model of a run: built, given the weights that it starts from, and averaged."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer

from vimfast.checkpoint import Loaded, OtherModel, described, load_for_finetuning, load_found
from vimfast.config import Config, ModelConfig
from vimfast.errors import UserError
from vimfast.image_size import ImageSize
from vimfast.models import create_model
from vimfast.models.grey import Grey
from vimfast.train.folder import RESOLVED_CONFIG
from vimfast.train.freezing import freeze
from vimfast.train.gradients import GradientSum
from vimfast.train.loop import Precision
from vimfast.train.losses import Objective, build_teacher
from vimfast.train.optim import WeightAverage, build_ema
from vimfast.train.report import Reporter
from vimfast.train.run_state import load_models
from vimfast.train.step import TrainStep


class Models(NamedTuple):
    """The models of a run, on its device, and what they compute in."""

    model: nn.Module
    average: WeightAverage | None  # of its weights; None: there is none to keep, or none to evaluate
    teacher: nn.Module | None
    precision: Precision

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """Under the names by which the record of an epoch knows them."""
        return {"": self.model, **({"ema_": self.average.module} if self.average is not None else {})}


def build_models(
    cfg: Config,
    num_classes: int,
    start: Loaded | None,
    device: torch.device,
    report: Reporter,
    sizes: Collection[ImageSize] = (),
    drop_path: float | None = None,
) -> Models:
    """The models that the settings describe, with the weights of the checkpoint, if there is one.

    Args:
        sizes: of the images that are trained on; none in evaluation.
        drop_path: the largest rate of stochastic depth; None: that of the settings.
    """
    dynamic = any(size != cfg.model.size for size in sizes)
    torch.manual_seed(cfg.run.seed)
    built = cfg.model if drop_path is None else replace(cfg.model, drop_path=drop_path)
    model = build_model(built, num_classes, dynamic)
    if not cfg.run.eval:
        check_patches(model, cfg.model.size, "--input-size")
        for size in sorted(sizes):
            check_patches(model, size, "a stage's size")
        _begin_with(model, cfg, cfg.finetune.finetune if start is None else "", report)
    model.to(device)
    average = build_ema(cfg.ema, model)
    precision = choose_precision(cfg.run.amp, device, report)
    if start is not None:
        resample = cfg.finetune.pos_embed_resample if cfg.run.eval else None
        with _naming_settings(start.path):
            average = load_models(
                start.state, str(start.path), model, average, report, resample=resample, evaluating=cfg.run.eval
            )
    teacher = None if cfg.run.eval else build_teacher(cfg.distill, num_classes, cfg.model.input_size, dynamic)
    return Models(model, average, None if teacher is None else teacher.to(device), precision)


def build_step(
    models: Models,
    optimizer: Optimizer,
    objective: Objective,
    clip_grad: float | None,
    accum_steps: int,
    processes: int,
) -> TrainStep:
    """The step that trains the model of a run.

    Args:
        processes: that run it together; 1: it runs alone.
    """
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


def build_model(cfg: ModelConfig, num_classes: int, dynamic_img_size: bool) -> nn.Module:
    """The model, on the CPU, with initial weights."""
    options = {"dynamic_img_size": dynamic_img_size} | cfg.options()
    model: nn.Module = create_model(
        cfg.model,
        num_classes=num_classes,
        img_size=cfg.input_size,
        drop_rate=cfg.drop,
        drop_path_rate=cfg.drop_path,
        scan_backend=cfg.scan_backend,
        **options,
    )
    if options.get("in_chans") == 1:
        Grey().before(model)
    if cfg.use_checkpoint:
        switch = getattr(model, "set_grad_checkpointing", None)
        if switch is None:
            raise UserError(f"{cfg.model} cannot recompute its activations", "drop --use-checkpoint")
        switch()
    return model


def check_patches(model: nn.Module, size: ImageSize, name: str) -> None:
    """Whether the patches cover the whole of images of this size, where a model is made of patches.

    Raises:
        UserError: some rows and columns are in none, and the model would never see them.
    """
    conv = getattr(getattr(model, "patch_embed", None), "proj", None)
    if not isinstance(conv, nn.Conv2d):
        return
    patch, stride, padding = conv.kernel_size[0], conv.stride[0], int(conv.padding[0])
    rest = ImageSize(*((side + 2 * padding - patch) % stride for side in size))
    if any(rest):
        smaller = ImageSize(*(side - more for side, more in zip(size, rest, strict=True)))
        larger = ImageSize(*(side + stride * (more > 0) for side, more in zip(smaller, rest, strict=True)))
        apart = " and ".join(f"{n} {lines}" for n, lines in zip(rest, ("rows", "columns"), strict=True) if n)
        unseen = f"{rest.height} rows and columns" if rest.height == rest.width else apart
        raise UserError(
            f"{name} {size} is not a whole number of patches of {patch} pixels every {stride}: the last {unseen} "
            "would never be seen",
            f"give {smaller.words} or {larger.words}",
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


@contextmanager
def _naming_settings(path: Path) -> Iterator[None]:
    """Where a checkpoint is of another model: suggest the settings of its run, if they are beside it."""
    try:
        yield
    except OtherModel as error:
        settings = path.parent / RESOLVED_CONFIG
        if not settings.is_file():
            raise
        raise OtherModel(error.problem, f"take its run's settings with --config {settings}, or {error.fix}") from None


def _begin_with(model: nn.Module, cfg: Config, finetune: str, report: Reporter) -> None:
    """Weights of another run, if there are any, and which of them are not to be trained."""
    if finetune:
        path, state, passed_over = load_found(Path(finetune), best=True)
        for note in passed_over:
            report.warn(note)
        how, size = cfg.finetune.pos_embed_resample, described(state).img_size
        with _naming_settings(path):
            lines = load_for_finetuning(model, state["model"], str(path), resample=how, img_size=size)
        for line in lines:
            report.say(line)
    if line := freeze(model, cfg.finetune):
        report.say(line)
