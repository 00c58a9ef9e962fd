"""Settings from a command line and a YAML file: who wins, and values of the right type."""

from __future__ import annotations

import os
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from vimfast.config.checks import check
from vimfast.config.flags import CONFIG, flag_parser
from vimfast.config.recipes import find_recipe
from vimfast.config.schema import Config, Kind, kinds
from vimfast.errors import UserError, did_you_mean


def load_config(argv: list[str]) -> Config:
    """The settings that a command line asks for.

    Raises:
        UserError: an unknown flag, key, recipe or choice (with the known ones that come close), or a value of the wrong
            type or out of its range.
    """
    return resolve(vars(flag_parser().parse_args(argv)))


def resolve(given: dict[str, Any]) -> Config:
    """The settings that were given, by name, over those of the recipe under :data:`~vimfast.config.flags.CONFIG`.

    Raises:
        UserError: as :func:`load_config` does.
    """
    config = Config()
    recipe = given.get(CONFIG)
    if recipe is not None:
        _apply_yaml(config, find_recipe(recipe))
    for section in fields(Config):
        part = getattr(config, section.name)
        for name in given.keys() & {f.name for f in fields(part)}:
            setattr(part, name, given[name])
        for f in fields(part):
            if f.metadata["path"]:
                setattr(part, f.name, os.path.expanduser(getattr(part, f.name)))
    check(config)
    return config


def _apply_yaml(config: Config, path: Path) -> None:
    try:
        sections = yaml.safe_load(path.read_text()) or {}
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(error).split())}") from None
    known_sections = [f.name for f in fields(Config)]
    if not isinstance(sections, dict):
        raise UserError(f"{path} holds no sections", f"the known ones are {', '.join(known_sections)}")
    for section, values in sections.items():
        if section not in known_sections:
            hint = did_you_mean(str(section), known_sections)
            raise UserError(
                f"{path}: unknown section {section!r}{hint}", f"the known ones are {', '.join(known_sections)}"
            )
        part = getattr(config, section)
        known = kinds(type(part))
        if not isinstance(values, dict | None):
            raise UserError(f"{path}: {section} is {values!r}", f"its keys are {', '.join(known)}")
        for name, value in (values or {}).items():
            if name not in known:
                hint = did_you_mean(str(name), known)
                raise UserError(
                    f"{path}: unknown key {f'{section}.{name}'!r}{hint}", f"the known ones are {', '.join(known)}"
                )
            setattr(part, name, _convert(value, known[name], f"{path}: {section}.{name}"))


def _convert(value: Any, kind: Kind, where: str) -> Any:
    """`value` as `kind`, strictly, but for what YAML gets wrong: it reads ``3e-4`` as a string."""
    if value is None and kind.optional:
        return None
    try:
        if kind.length == 1:
            return _scalar(value, kind.base)
        if not isinstance(value, list) or (kind.length and len(value) != kind.length):
            raise ValueError
        return tuple(_scalar(v, kind.base) for v in value)
    except ValueError:
        several = f"a list of {kind.length} numbers" if kind.length else "a list of numbers"
        wanted = f"of type {kind.base.__name__}" if kind.length == 1 else several
        raise UserError(f"{where} is {value!r}", f"it must be {wanted}") from None


def _scalar(value: Any, base: type) -> Any:
    if base is float and isinstance(value, int | float | str) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, base) and not (base is int and isinstance(value, bool)):
        return value
    raise ValueError
