"""What is refused when settings are loaded, rather than seconds later, once data is open."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from typing import Any

from vimfast.config.choices import MUON
from vimfast.config.schema import Config, OptimConfig, StageConfig, kinds
from vimfast.config.stages import staged
from vimfast.errors import UserError, did_you_mean


def check(config: Config, called: Callable[[str], str]) -> None:
    """Whether every value is in its range and one of its choices.

    Args:
        called: from the name of a setting to what its user gave it as, such as ``--batch-size``.

    Raises:
        UserError: one is not.
    """
    sched: str = config.schedule.sched
    if sched == "plateau":
        raise UserError(
            "--sched plateau follows past accuracies, which a resumed run does not have", "try cosine or step"
        )
    _check_settings(config, called)
    for number, stage in enumerate(staged(config), 1):
        if stage.config is not config:
            try:
                _check_settings(stage.config, lambda name: name)  # only what the stage itself has can be wrong
            except UserError as error:
                raise UserError(f"stage {number}: {error.problem}", error.fix) from None
    _check_optimizer(config.optim.opt)
    clip = config.optim.clip_grad
    if clip is not None and not clip > 0:
        raise UserError(f"{called('clip_grad')} is {clip}", "it must be above 0; drop it for no clipping")
    config.data.cache_bytes  # noqa: B018  # raises
    if config.model.in_chans not in (1, 3):
        raise UserError(f"{called('in_chans')} is {config.model.in_chans}", "it must be 3, or 1 for grey images")
    if config.optim.layer_decay == 0:
        raise UserError(f"{called('layer_decay')} is 0", "it must be above 0; --freeze-layers keeps layers as they are")
    if config.optim.on_divergence == "rollback" and not (config.run.output_dir or config.run.eval):
        raise UserError("--on-divergence rollback returns to a checkpoint, and there is no --output_dir", "add one")


def _check_settings(config: Config, called: Callable[[str], str]) -> None:
    """What a stage may be wrong about."""
    for section in fields(Config):
        part = getattr(config, section.name)
        of = kinds(type(part))
        for f in fields(part):
            value, name = getattr(part, f.name), called(f.name)
            if value is None or of[f.name].base is StageConfig or value in of[f.name].words:
                continue
            _check_finite(name, value)
            _check_range(name, value, f.metadata["least"], f.metadata["most"], of[f.name].optional)
            choices = of[f.name].choices
            if f.metadata["choices"] is not None and value != f.default:
                choices = f.metadata["choices"]()
            if choices and value not in choices:
                hint = did_you_mean(value, choices)
                raise UserError(f"{name} is {value!r}{hint}", f"it must be one of {', '.join(choices)}")
    _check_augmentation(config, called)


def _check_finite(name: str, value: Any) -> None:
    for number in value if isinstance(value, tuple) else (value,):
        if isinstance(number, float) and not math.isfinite(number):
            raise UserError(f"{name} is {number}", "it must be a finite number")


def _check_range(name: str, value: Any, least: float | None, most: float | None, optional: bool) -> None:
    if isinstance(value, tuple) and least is not None:
        value = min(value)
    if least is not None and value < least:
        raise UserError(f"{name} is {value}", f"it must be >= {least}{', or left out' * optional}")
    if most is not None and value > most:
        raise UserError(f"{name} is {value}", f"it must be <= {most}")


def _check_optimizer(name: str) -> None:
    """Whether it is ours, or timm's, whose names are asked for only where they matter, since that imports torch."""
    if name in (OptimConfig().opt, MUON):
        return
    from timm.optim import list_optimizers

    known = [str(own) for own in list_optimizers()]
    if name.lower().removeprefix("lookahead_") not in known:
        raise UserError(
            f"--opt {name!r} is not an optimizer of timm's{did_you_mean(name, known)}", "adamw is the default"
        )


def _check_augmentation(config: Config, called: Callable[[str], str]) -> None:
    """Build what checks its own arguments and is cheap to build."""
    from vimfast.augment.crops import CentreCrop, RandomResizedCrop  # here, for --help needs no numpy
    from vimfast.augment.randaugment import policy

    data, augment, box = config.data, config.augment, config.mix.cutmix_minmax
    RandomResizedCrop(data.scale, data.ratio)
    CentreCrop(data.eval_crop_ratio)
    if not augment.three_augment:  # which stands for itself
        policy(augment.aa, data.train_interpolation)
    if box is not None and not 0 <= box[0] <= box[1] <= 1:
        raise UserError(f"{called('cutmix_minmax')} is {box[0]} {box[1]}", "it must be MIN <= MAX, from 0 to 1")
