"""Optimizer, learning rate and weight average: timm's, wired as the original recipe wires them."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from timm.optim import (
    create_optimizer_v2,
    list_optimizers,
    param_groups_layer_decay,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer

from vimfast.config import EmaConfig, OptimConfig, ScheduleConfig
from vimfast.config.choices import MUON
from vimfast.errors import UserError, did_you_mean
from vimfast.train.muon import Muon, hidden_matrices


def peak_lr(cfg: OptimConfig, global_batch: int) -> float:
    """The learning rate after warm-up: lr x global batch / 512 (Goyal et al., 2017, as DeiT scales it)."""
    return cfg.lr if cfg.unscale_lr else cfg.lr * global_batch / 512


def build_optimizer(cfg: OptimConfig, model: nn.Module, lr: float) -> Optimizer:
    """An optimizer over two groups: weights that decay, and those that must not. It is of timm's factory, but for
    ``muon``, which is ours and has a third: hidden matrices.

    With ``layer_decay`` there are two groups for each layer, with the layer's share of the learning rate.

    Raises:
        UserError: timm knows no optimizer of that name, or it does not take these options.
    """
    exempt = set(getattr(model, "no_weight_decay", set)())
    if not cfg.decay_a_log:
        exempt |= {name for name, _ in model.named_parameters() if name.endswith(("A_log", "A_b_log"))}
    if cfg.layer_decay is None:
        groups = param_groups_weight_decay(model, cfg.weight_decay, no_weight_decay_list=exempt)
    else:
        groups = param_groups_layer_decay(model, cfg.weight_decay, exempt, layer_decay=cfg.layer_decay)
    options: dict[str, Any] = {} if cfg.opt_eps is None else {"eps": cfg.opt_eps}
    if cfg.opt_betas is not None:
        options["betas"] = cfg.opt_betas
    if cfg.opt == "adamw":
        options["fused"] = True
    try:
        if cfg.opt == MUON:
            hidden = hidden_matrices(model)
            orthogonal = {p for name, p in model.named_parameters() if name in hidden}
            return Muon(_with_muon(groups, orthogonal), lr, **options)
        return create_optimizer_v2(groups, cfg.opt, lr, 0.0, cfg.momentum, **options)
    except (ValueError, AssertionError, TypeError) as error:
        known = [MUON, *map(str, list_optimizers())]
        if cfg.opt in known:
            raise UserError(
                f"--opt {cfg.opt} does not take these options ({error})", "change --opt-eps or --opt-betas"
            ) from None
        raise UserError(f"--opt {cfg.opt!r} is not an optimizer of timm's{did_you_mean(cfg.opt, known)}") from None


def _with_muon(groups: list[dict[str, Any]], matrices: set[nn.Parameter]) -> list[dict[str, Any]]:
    """The groups, with those of their parameters that are such matrices in groups of their own."""
    split = [
        {**group, "muon": muon, "params": [p for p in group["params"] if (p in matrices) == muon]}
        for group in groups
        for muon in (False, True)
    ]
    return [group for group in split if group["params"]]


class LearningRate:
    """The learning rate as a function of the place in the run: timm's schedule, entered as the original enters it.

    By default the rate moves once an epoch, and one epoch late: epochs 0 and 1 both run at the schedule's start, as
    in DeiT and Vim, where the scheduler steps after the epoch with that epoch's number. With ``sched_on_updates``
    it moves every step and nothing is late.
    """

    def __init__(self, cfg: ScheduleConfig, optimizer: Optimizer, steps_per_epoch: int) -> None:
        self.on_updates, self.steps_per_epoch, self.optimizer = cfg.sched_on_updates, steps_per_epoch, optimizer
        self._fixed = [float(group["lr"]) for group in optimizer.param_groups]  # where there is no schedule
        self._shares = [float(group.get("lr_scale", 1.0)) for group in optimizer.param_groups]  # of their layers
        self._lowered = 1.0
        noise: Any = None if cfg.lr_noise is None else list(cfg.lr_noise)  # shares of the schedule, or None
        try:
            self.scheduler: Scheduler | None = create_scheduler_v2(
                optimizer,
                cfg.sched,
                num_epochs=cfg.epochs,
                decay_epochs=cfg.decay_epochs,
                cooldown_epochs=cfg.cooldown_epochs,
                decay_rate=cfg.decay_rate,
                min_lr=cfg.min_lr,
                warmup_lr=cfg.warmup_lr,
                warmup_epochs=min(cfg.warmup_epochs, cfg.epochs - 1),
                noise=noise,
                noise_pct=cfg.lr_noise_pct,
                noise_std=cfg.lr_noise_std,
                step_on_epochs=not self.on_updates,
                updates_per_epoch=steps_per_epoch,
            )[0]
        except (AssertionError, ValueError, RuntimeError) as error:
            raise UserError(
                f"timm cannot build --sched {cfg.sched!r} ({error or 'unknown name'})", "try cosine"
            ) from None
        self.scale(1.0)

    def set(self, epoch: int, step: int, steps: int | None = None, share: float = 1.0) -> None:
        """Set the optimizer's rate for `step` of `epoch`.

        Args:
            steps: of this epoch; None: as many as an epoch of the schedule has, which is passed faster or more slowly
                where they differ.
            share: of the schedule's rate, in this epoch.
        """
        self._scale_by(self._lowered * share)
        if self.scheduler is None:
            return
        if self.on_updates:
            of = self.steps_per_epoch
            self.scheduler.step_update(epoch * of + step * of // (steps or of))
        else:
            self.scheduler.step(max(epoch - 1, 0))

    def scale(self, factor: float) -> None:
        """Multiply the schedule's rates by `factor` from now on."""
        self._lowered = factor
        self._scale_by(factor)

    def _scale_by(self, factor: float) -> None:
        for group, fixed, share in zip(self.optimizer.param_groups, self._fixed, self._shares, strict=True):
            group["lr_scale"] = factor * share  # timm's schedulers multiply by it
            if self.scheduler is None:
                group["lr"] = factor * share * fixed

    @property
    def value(self) -> float:
        """Of the layers that have all of it."""
        return max(float(group["lr"]) for group in self.optimizer.param_groups)


Averaged = tuple[list[Tensor], list[Tensor], list[tuple[Tensor, Tensor]]]  # averages, of what, and what is copied


class WeightAverage(ModelEmaV3):
    """timm's exponential moving average of the whole state dict, without a walk over the state dict in each step.

    With ``use_warmup`` its decay is a function of `updates`, which the caller sets: those of the run, the next one
    included.
    """

    updates = 0

    def get_decay(self, step: int | None = None) -> float:
        """timm's, of the next update."""
        return float(super().get_decay(self.updates if step is None and self.use_warmup else step))

    def apply_update_(self, model: nn.Module, decay: float) -> None:
        if not self.foreach:  # kept in host memory
            super().apply_update_(model, decay)
            return
        self.move(self._tensors(model), decay)

    @staticmethod
    def move(tensors: Averaged, decay: float) -> None:
        """Average and copy these."""
        averages, weights, others = tensors
        if averages:
            torch._foreach_lerp_(averages, weights, weight=1.0 - decay)
        for own, new in others:
            own.copy_(new)

    def besides(self, model: nn.Module, done: Collection[int]) -> Averaged:
        """What an update moves, less the averages at these addresses."""
        averages, weights, others = self._tensors(model)
        left = [pair for pair in zip(averages, weights, strict=True) if pair[0].data_ptr() not in done]
        return [own for own, _ in left], [new for _, new in left], others

    def _tensors(self, model: nn.Module) -> Averaged:
        """What is averaged, with what, and what is copied (counters); they alias the modules' own memory."""
        if self._known is None or self._known[0] is not model:
            pairs = list(zip(self.module.state_dict().values(), model.state_dict().values(), strict=True))
            floats = [pair for pair in pairs if pair[0].is_floating_point()]
            others = [pair for pair in pairs if not pair[0].is_floating_point()]
            self._known = (model, ([own for own, _ in floats], [new for _, new in floats], others))
        return self._known[1]

    _known: tuple[nn.Module, Averaged] | None = None


def build_ema(cfg: EmaConfig, model: nn.Module) -> WeightAverage | None:
    """An average of the whole state dict, float32, updated after every step."""
    if not cfg.model_ema:
        return None
    return WeightAverage(
        model,
        decay=cfg.model_ema_decay,
        use_warmup=cfg.model_ema_warmup,
        device=torch.device("cpu") if cfg.model_ema_force_cpu else None,
    )
