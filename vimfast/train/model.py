"""The model of a run: built, given the weights that it starts from, and averaged."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from vimfast.checkpoint import load_checkpoint, load_for_finetuning
from vimfast.config import Config, ModelConfig
from vimfast.errors import UserError
from vimfast.models import create_model
from vimfast.train.freezing import freeze
from vimfast.train.loop import Precision
from vimfast.train.optim import WeightAverage, build_ema
from vimfast.train.report import Reporter
from vimfast.train.resume import Origin, load_models


class Models(NamedTuple):
    """A model on its device, the average of its weights, and what both compute in."""

    model: nn.Module
    average: WeightAverage | None  # None: there is none to keep, or none to evaluate
    precision: Precision

    @property
    def evaluated(self) -> dict[str, nn.Module]:
        """Both, under the names by which the record of an epoch knows them."""
        return {"": self.model, **({"ema_": self.average.module} if self.average is not None else {})}


def build_models(cfg: Config, num_classes: int, start: Origin | None, device: torch.device, report: Reporter) -> Models:
    """The model that the settings describe, with the weights of the checkpoint, if there is one."""
    torch.manual_seed(cfg.run.seed)
    model = build_model(cfg.model, num_classes)
    if not cfg.run.eval:
        check_patches(model, cfg.model.input_size)
        _begin_with(model, cfg, cfg.finetune.finetune if start is None else "", report)
    model.to(device)
    average = build_ema(cfg.ema, model)
    precision = choose_precision(cfg.run.amp, device, report)
    if start is not None:
        resample = cfg.finetune.pos_embed_resample if cfg.run.eval else None
        average = load_models(
            start.state, str(start.path), model, average, report, resample=resample, evaluating=cfg.run.eval
        )
    return Models(model, average, precision)


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


def _begin_with(model: nn.Module, cfg: Config, finetune: str, report: Reporter) -> None:
    """Weights of another run, if there are any, and which of them are not to be trained."""
    if finetune:
        weights = load_checkpoint(Path(finetune))["model"]
        for line in load_for_finetuning(model, weights, finetune, resample=cfg.finetune.pos_embed_resample):
            report.say(line)
    if line := freeze(model, cfg.finetune):
        report.say(line)
