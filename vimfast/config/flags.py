"""The command line of ``python -m vimfast.train``: a flag for each setting, made from its field."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import Field, fields
from typing import Any

import yaml

from vimfast.cli import SIZE, Parser, image_size, unfit
from vimfast.config.compat import TIMM, add_flags
from vimfast.config.recipes import recipes
from vimfast.config.schema import Config, Kind, StageConfig, kinds

CONFIG, PRINT_CONFIG = "config", "print_config"  # the flags that are no settings
_LETTERS = {int: "N", float: "X", str: "NAME"}  # what stands for a value


def flag_parser() -> Parser:
    """Reads flags into a namespace that holds nothing but the settings given."""
    parser = Parser(
        "python -m vimfast.train",
        "Train or evaluate a Vision Mamba. Settings: defaults < --config RECIPE < these flags.",
        argument_default=argparse.SUPPRESS,
        epilog="\n".join(
            [
                "examples:",
                "  vimfast train --config vim_tiny --data-path shards/ --output_dir runs/tiny",
                "without a GPU, for minutes, to see that everything works:",
                "  vimfast train --config debug --data-path shards/ --output_dir runs/try",
            ]
        ),
    )
    parser.usage = f"{parser.prog} --data-path DATA [--config RECIPE] [FLAGS]"
    parser.elsewhere = {
        **{name.replace("_", "-"): f"--{own.replace('_', '-')}" for name, own in TIMM.items()},
        "data": "--data-path",
        "version": "vimfast --version",
    }
    parser.path_flag = "--data-path"
    known = ", ".join(recipes())
    parser.add_argument(f"--{CONFIG}", metavar="RECIPE", help=f"start from a recipe ({known}), or a YAML file")
    text = "print all settings as YAML, each with where it comes from, and stop"
    parser.add_argument("--print-config", "--print_config", action="store_true", help=text)
    add_flags(parser)
    for section in fields(Config):
        group = parser.add_argument_group(section.name)
        part: Any = section.default_factory
        of = kinds(part)
        for f in fields(part):
            _add_flag(group, f, of[f.name])
    return parser


def _add_flag(group: Any, f: Field[Any], kind: Kind) -> None:
    hyphen = f.name.replace("_", "-")
    names = [hyphen, *f.metadata["aliases"]]
    flags = list(dict.fromkeys(f"--{n}" for name in names for n in (name, name.replace("-", "_"))))
    default = f.default_factory() if callable(f.default_factory) else f.default
    text = f.metadata["help"]
    if not (default in (None, "", {}, ()) or default is False):
        shown = " ".join(f"{part:g}" for part in default) if isinstance(default, tuple) else default
        text += f" [{'on' if default is True else shown}]"
    if kind.base is bool:
        negative = list(dict.fromkeys([f"--no-{hyphen}", f"--no_{f.name}", f"--no-{f.name}"]))
        on = group.add_argument(*flags, dest=f.name, action="store_true", help=text)
        on.metavar = f"| {negative[0]}" if default else None
        group.add_argument(*negative, dest=f.name, action="store_false", help=argparse.SUPPRESS)
    elif kind.base is dict:
        group.add_argument(*flags, dest=f.name, nargs="+", action=_KeyValue, metavar="NAME=VALUE", help=text)
    elif kind.size:
        group.add_argument(*flags, dest=f.name, type=image_size, help=text, metavar=SIZE)
    elif kind.base is StageConfig:
        group.add_argument(*flags, dest=f.name, type=_yaml, help=text, metavar="YAML")
    elif kind.length != 1:
        several = {"nargs": kind.length or "+", "action": _AsTuple, "metavar": _LETTERS[kind.base]}
        group.add_argument(*flags, dest=f.name, type=_reader(kind), help=text, **several)
    else:
        metavar = "|".join(kind.choices) or ("PATH" if f.metadata["path"] else _LETTERS[kind.base])
        metavar = "|".join([metavar, *kind.words])
        words: dict[str, Any] = {"nargs": "+", "action": _AsWords} if f.metadata["words"] else {}
        group.add_argument(*flags, dest=f.name, type=_reader(kind), help=text, metavar=metavar, **words)


def _reader(kind: Kind) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        if text in kind.words:
            return text
        try:
            return kind.base(text)
        except ValueError:
            raise unfit(text, kind.wanted) from None

    return read


def _yaml(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not YAML ({' '.join(str(error).split())})") from None


class _KeyValue(argparse.Action):
    """Collects ``name=value`` words into a dict, each value read as YAML."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = {}
        for word in values:
            name, equals, value = word.partition("=")
            if not equals:
                parser.error(f"{option_string} takes name=value words, not {word!r}")
            pairs[name] = yaml.safe_load(value)
        setattr(namespace, self.dest, pairs)


class _AsTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class _AsWords(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, " ".join(values))
