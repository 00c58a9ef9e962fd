"""Settings from a command line and a YAML file: who wins, and values of the right type."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from vimfast.cli import print_out
from vimfast.config.checks import check
from vimfast.config.compat import TIMM
from vimfast.config.flags import CONFIG, PRINT_CONFIG, flag_parser
from vimfast.config.recipes import find_recipe
from vimfast.config.schema import Config, Kind, StageConfig, kinds
from vimfast.config.stages import staged_settings
from vimfast.errors import UserError, did_you_mean
from vimfast.image_size import ImageSize

_COMMENTS_AT = 44  # columns; after longer settings they come later


def load_config(argv: list[str]) -> Config:
    """The settings that a command line asks for. Of one that asks to see them, they are printed and the program ends.

    Raises:
        UserError: an unknown flag, key, recipe or choice (with the known ones that come close), or a value of the wrong
            type or out of its range.
    """
    return resolve(vars(flag_parser().parse_args(argv)))


def resolve(given: dict[str, Any]) -> Config:
    """The settings that were given, by name, over those of the recipe under :data:`~vimfast.config.flags.CONFIG`.

    Raises:
        UserError: as :func:`load_config` does.
        SystemExit: they were printed, as :data:`~vimfast.config.flags.PRINT_CONFIG` asked for.
    """
    config = Config()
    origins: dict[str, str] = {}  # of settings that are not the default, by name
    recipe = given.get(CONFIG)
    if recipe is not None:
        origins |= dict.fromkeys(_apply_yaml(config, find_recipe(recipe)), recipe)
    for section in fields(Config):
        part = getattr(config, section.name)
        for name in given.keys() & {f.name for f in fields(part)}:
            origins[name] = _flag(name)
            stages = kinds(type(part))[name].base is StageConfig
            setattr(part, name, _stages(given[name], origins[name]) if stages else given[name])
        for f in fields(part):
            if f.metadata["path"]:
                setattr(part, f.name, os.path.expanduser(getattr(part, f.name)))
    check(config, lambda name: _called(name, origins))
    if given.get(PRINT_CONFIG):
        print_out(annotated(config, origins))
        sys.exit(0)
    return config


def _called(name: str, origins: Mapping[str, str]) -> str:
    """A setting as its user has it: by its flag, or by its name in a recipe."""
    flag = _flag(name)
    origin = origins.get(name, flag)
    return flag if origin == flag else f"{origin}: {name}"


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def annotated(config: Config, origins: Mapping[str, str]) -> str:
    """The settings as YAML that ``--config`` reads back, each with a comment that says where its value comes from."""
    rows = []
    for section, values in config.to_dict().items():
        rows.append((f"{section}:", ""))
        rows += [(f"  {name}: {_flow(value)}", f"  # {origins.get(name, 'default')}") for name, value in values.items()]
    width = min(max(len(text) for text, _ in rows), _COMMENTS_AT)
    return "\n".join(f"{text:{width}}{comment}".rstrip() for text, comment in rows)


def _flow(value: Any) -> str:
    """On one line."""
    return yaml.safe_dump(value, default_flow_style=True, width=sys.maxsize).removesuffix("...\n").strip()


def _apply_yaml(config: Config, path: Path) -> list[str]:
    """Set what a file has: sections with their keys, and keys alone, as timm writes them, whose names are unique.

    Returns:
        the names of the settings.
    """
    content = _read_yaml(path)
    sections = {f.name: getattr(config, f.name) for f in fields(Config)}
    home = {name: section for section, part in sections.items() for name in kinds(type(part))}
    if unknown := [key for key in content if key not in sections and key not in home]:
        raise _unknown(path, content, unknown, [*sections, *home])
    names: list[str] = []
    for key, value in content.items():
        if key in sections and (isinstance(value, dict | None) or key not in home):  # else it is --model or --finetune
            _apply_section(sections[key], key, value, path)
            names += value or ()
        else:
            _set(sections[home[key]], home[key], key, value, path)
            names.append(key)
    return names


def _unknown(path: Path, content: dict[Any, Any], keys: list[Any], known: list[str]) -> UserError:
    """All of them at once: timm writes many settings."""
    if isinstance(content[keys[0]], dict):
        sections = ", ".join(f.name for f in fields(Config))
        return UserError(
            f"{path}: unknown section {keys[0]!r}{did_you_mean(str(keys[0]), known)}", f"the known ones are {sections}"
        )
    names = ", ".join(f"{key} ({TIMM[key]} here)" if key in TIMM else str(key) for key in keys)
    hint = did_you_mean(str(keys[0]), known) if keys[0] not in TIMM else ""
    what = f"settings {names}" if len(keys) > 1 else f"setting {names}"
    fix = "rename them or leave them out" if len(keys) > 1 else "rename it or leave it out"
    return UserError(f"{path}: unknown {what}{hint}", f"{fix}; vimfast train --help lists all settings")


def _apply_section(part: Any, section: str, values: Any, path: Path) -> None:
    known = kinds(type(part))
    if not isinstance(values, dict | None):
        raise UserError(f"{path}: {section} is {values!r}", f"its keys are {', '.join(known)}")
    for name, value in (values or {}).items():
        if name not in known:
            hint = did_you_mean(str(name), known)
            raise UserError(
                f"{path}: unknown key {f'{section}.{name}'!r}{hint}", f"the known ones are {', '.join(known)}"
            )
        _set(part, section, name, value, path)


def _set(part: Any, section: str, name: str, value: Any, path: Path) -> None:
    setattr(part, name, _convert(value, kinds(type(part))[name], f"{path}: {section}.{name}"))


def _read_yaml(path: Path) -> dict[Any, Any]:
    if path.is_dir():
        inside = path / "config.yaml"
        fix = f"did you mean {inside}?" if inside.is_file() else "give a recipe's name, or a YAML file"
        raise UserError(f"--config {path} is a folder", fix)
    try:
        content = yaml.safe_load(path.read_text())
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = "" if mark is None else f", line {mark.line + 1}, column {mark.column + 1}"
        raise UserError(f"{path}{where}: {error.problem or error.context}", "correct the YAML there") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    if content is None:
        raise UserError(f"{path} sets nothing", "write settings there, such as epochs: 100, or drop --config")
    if not isinstance(content, dict):
        known = ", ".join(f.name for f in fields(Config))
        raise UserError(f"{path} holds no settings but {_kind(content)}", f"its sections may be {known}")
    return content


def _kind(content: Any) -> str:
    return "a list" if isinstance(content, list) else repr(content)


def _convert(value: Any, kind: Kind, where: str) -> Any:
    """`value` as `kind`, strictly, but for what YAML gets wrong: it reads ``3e-4`` as a string."""
    if value is None and kind.optional:
        return None
    if kind.base is StageConfig:
        return _stages(value, where)
    try:
        if isinstance(value, str) and value in kind.words:
            return value
        if kind.size:
            sides = [_scalar(side, int) for side in value] if isinstance(value, list) else [_scalar(value, int)] * 2
            height, width = sides
            return ImageSize(height, width).plain
        if kind.length == 1:
            return _scalar(value, kind.base)
        if not isinstance(value, list) or (kind.length and len(value) != kind.length):
            raise ValueError
        return tuple(_scalar(v, kind.base) for v in value)
    except ValueError:
        if kind.size:
            raise UserError(f"{where} is {value!r}", "it must be an integer, or [height, width]") from None
        several = f"a list of {kind.length} numbers" if kind.length else "a list of numbers"
        wanted = kind.wanted if kind.length == 1 else several
        raise UserError(f"{where} is {value!r}", f"it must be {wanted}") from None


def _stages(value: Any, where: str) -> tuple[StageConfig, ...]:
    if not isinstance(value, list):
        raise UserError(f"{where} is {value!r}", "it must be a list of stages, such as [{epochs: 10, input_size: 128}]")
    return tuple(_stage(stage, f"{where}, stage {number}") for number, stage in enumerate(value, 1))


def _stage(value: Any, where: str) -> StageConfig:
    if not isinstance(value, dict):
        raise UserError(f"{where} is {value!r}", "it must be settings, such as {epochs: 10, input_size: 128}")
    own, known = kinds(StageConfig), staged_settings()
    lengths = {name: own[name] for name in ("epochs", "share")}
    for name in value:
        if name in lengths or name in known:
            continue
        everywhere = any(name in kinds(type(part)) for part in vars(Config()).values())
        words = f"{name} cannot change with the stage" if everywhere else f"unknown key {name!r}"
        hint = "" if everywhere else did_you_mean(str(name), [*lengths, *known])
        raise UserError(f"{where}: {words}{hint}", f"a stage may have {', '.join([*lengths, *known])}")
    given = {name: _convert(v, {**known, **lengths}[name], f"{where}: {name}") for name, v in value.items()}
    return StageConfig(given.pop("epochs", None), given.pop("share", None), given)


def _scalar(value: Any, base: type) -> Any:
    if base is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, base) and not (base is int and isinstance(value, bool)):
        return value
    raise ValueError
