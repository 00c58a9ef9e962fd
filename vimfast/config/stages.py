"""The stages of a run: which epochs they are, and their settings."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from vimfast.config.choices import AUTO
from vimfast.config.schema import Config, Kind, StageConfig, kinds
from vimfast.errors import UserError, counted

MAY_CHANGE = (
    *("input_size", "drop_path", "batch_size", "accum_steps", "global_batch_size", "lr", "repeated_aug"),
    *("scale", "ratio", "hflip", "aa", "color_jitter", "three_augment", "src", "reprob", "remode", "recount"),
    *("mixup", "cutmix", "cutmix_minmax", "mixup_prob", "mixup_switch_prob", "mixup_mode", "mixup_group"),
    "smoothing",
)
"""The settings that may change with the stage."""


class Staged(NamedTuple):
    """Some epochs of a run, and all settings as they are there."""

    epochs: range
    config: Config


def staged(config: Config) -> list[Staged]:
    """The stages of a run in their order; where the settings have none, the whole run is one.

    Raises:
        UserError: their epochs do not add up to the run's, or one has none.
    """
    stages, epochs = config.schedule.stages, config.schedule.epochs
    if not stages:
        return [Staged(range(epochs), config)]
    return [Staged(span, _changed(config, stage)) for span, stage in zip(_spans(stages, epochs), stages, strict=True)]


def stage_of(schedule: Mapping[str, Any], epoch: int) -> dict[str, Any]:
    """What the stage of an epoch changes, by the section as a checkpoint has it; nothing where that has no stages."""
    end, stages = 0.0, schedule.get("stages") or ()
    for stage in stages:
        end += stage.get("epochs", stage.get("share", 1) * schedule["epochs"])
        if epoch < round(end):
            return dict(stage)
    return dict(stages[-1]) if stages else {}


@functools.cache
def staged_settings() -> dict[str, Kind]:
    """The kinds of those."""
    parts: list[Any] = [section.default_factory for section in fields(Config)]
    known = {name: kind for part in parts for name, kind in kinds(part).items()}
    return {name: known[name] for name in MAY_CHANGE}


def _changed(config: Config, stage: StageConfig) -> Config:
    parts = {section.name: getattr(config, section.name) for section in fields(config)}
    for name, part in parts.items():
        own = {key: value for key, value in stage.changes.items() if key in kinds(type(part))}
        parts[name] = replace(part, **own) if own else part
    return replace(config, **parts)


def _spans(stages: Sequence[StageConfig], epochs: int) -> list[range]:
    ends, end = [0], 0.0
    for number, stage in enumerate(stages, 1):
        _check(stage, f"stage {number}", is_last=number == len(stages))
        if stage.epochs is not None:
            end += stage.epochs
        elif stage.share is not None:
            end += stage.share * epochs
        else:
            end = epochs
        if round(end) <= ends[-1]:
            raise UserError(
                f"stage {number} has none of the {counted(epochs, 'epoch')} (--epochs)",
                "give it more, or train without stages: --stages '[]'",
            )
        ends.append(round(end))
    if ends[-1] != epochs:
        raise UserError(
            f"the stages end after {ends[-1]} epochs and --epochs is {epochs}",
            "let them add up, or leave epochs and share out of the last stage, which then takes the rest",
        )
    return [range(begin, end) for begin, end in itertools.pairwise(ends)]


def _check(stage: StageConfig, name: str, *, is_last: bool) -> None:
    if stage.epochs is not None and stage.share is not None:
        raise UserError(f"{name} has {stage.epochs} epochs and a share of {stage.share}", "give one of the two")
    if stage.epochs is None and stage.share is None and not is_last:
        raise UserError(f"{name} has neither epochs nor a share of them", "only the last stage may leave them out")
    if stage.epochs is not None and stage.epochs < 1:
        raise UserError(f"{name} has {stage.epochs} epochs", "it must have 1 or more")
    if stage.share is not None and not 0 < stage.share <= 1:
        raise UserError(f"the share of {name} is {stage.share}", "it must be above 0 and at most 1")
    if stage.changes.get("batch_size") == AUTO:
        raise UserError(
            f"the batch_size of {name} is {AUTO}", "give a number; only that of the whole run is looked for"
        )
