"""Every setting of a run: defaults < YAML (``--config``) < command line, typed and strict.

Each section below is one dataclass and goes to the part it is named after; its fields are at once the YAML keys
(under the section's name) and the command-line flags. Names and defaults are those of hustvl/Vim's ``main.py``
where it has them, so its command lines carry over.
"""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from vimfast.cli import Parser
from vimfast.errors import UserError, did_you_mean


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
) -> Any:
    """A dataclass field that is also a flag: `help` is its ``--help`` line, `aliases` are other spellings."""
    metadata = {"help": help, "least": least, "aliases": aliases, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class ModelConfig:
    model: str = option("vim_tiny_patch16_224", "name of a Vision Mamba, or of any timm model")
    model_kwargs: dict = option({}, "constructor options for the model, e.g. depth=4 embed_dim=64")
    num_classes: int | None = option(None, "classes of the head; default: as many as the data has", least=0)
    input_size: int = option(224, "side of the square input, pixels", least=1)
    drop: float = option(0.0, "dropout rate after the position embedding", least=0)
    drop_path: float = option(0.1, "stochastic depth rate of the last block", least=0)
    scan_backend: str = option("auto", "kernels of the model: auto, gluon, mamba_ssm, reference")
    use_checkpoint: bool = option(False, "recompute activations in backward to save memory")
    torch_compile: bool = option(False, "compile the model; TORCH_COMPILE=1 does the same")
    cuda_graph: bool = option(True, "replay training steps as a CUDA graph where the model allows it")


@dataclass
class DataConfig:
    data_path: str = option("", "shards from vimfast-prepare, or a folder tree with train/ and val/")
    batch_size: int = option(64, "training pictures a step on each GPU (or process)", least=1)
    eval_batch_size: int | None = option(
        None, "validation pictures a step on each GPU; default: as in training", least=1
    )
    repeated_aug: bool = option(True, "three augmented copies of each drawn picture, as DeiT and Vim do")
    scale: tuple[float, float] = option((0.08, 1.0), "area of a training crop, as a share of the picture: MIN MAX")
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "width over height of a training crop: MIN MAX")
    hflip: float = option(0.5, "probability of a horizontal flip in training", least=0)
    train_interpolation: str = option("bicubic", "resampling filter in training", choices=("bicubic", "bilinear"))
    eval_crop_ratio: float = option(0.875, "validation resizes the short side to input size / this, then crops")
    num_workers: int | None = option(None, "decoding threads of each process; default: the cores it may use", least=1)
    prefetch: int = option(2, "batches decoded ahead", least=1)


@dataclass
class MixConfig:
    mixup: float = option(0.8, "mixup alpha; 0 turns it off", least=0)
    cutmix: float = option(1.0, "cutmix alpha; 0 turns it off", least=0)
    cutmix_minmax: tuple[float, float] | None = option(None, "cutmix box side as a share of the picture: MIN MAX")
    mixup_prob: float = option(1.0, "probability of mixing at all", least=0)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", least=0)
    mixup_mode: str = option("batch", "one draw for each batch, pair or element", choices=("batch", "pair", "elem"))
    smoothing: float = option(0.1, "label smoothing", least=0)
    bce_loss: bool = option(False, "binary cross entropy on every class a target holds (smoothing is then unused)")


@dataclass
class OptimConfig:
    opt: str = option("adamw", "any optimizer of timm's factory")
    opt_eps: float | None = option(1e-8, "epsilon of the optimizer")
    opt_betas: tuple[float, ...] | None = option(None, "betas of the optimizer; default: its own")
    momentum: float = option(0.9, "momentum of SGD", least=0)
    weight_decay: float = option(
        0.05, "weight decay; 1-D tensors, biases, position and class tokens have none", least=0
    )
    decay_a_log: bool = option(True, "decay A_log too, as the published runs did")
    clip_grad: float | None = option(None, "largest gradient norm; default: no clipping")
    lr: float = option(5e-4, "learning rate for a global batch of 512; scaled in proportion to the batch", least=0)
    unscale_lr: bool = option(False, "take --lr as it is, whatever the batch")
    accum_steps: int = option(1, "batches of --batch-size on each GPU that make one update", least=1)
    skip_limit: int = option(
        20, "steps in a row that may be skipped, their gradients being no numbers, before the run stops", least=1
    )


@dataclass
class ScheduleConfig:
    epochs: int = option(300, "epochs to train", least=1)
    sched: str = option("cosine", "any schedule of timm's factory: cosine, step, poly, constant, ...")
    sched_on_updates: bool = option(False, "move the learning rate every step instead of every epoch")
    warmup_lr: float = option(1e-6, "first learning rate of the warm-up (not scaled)")
    min_lr: float = option(1e-5, "last learning rate (not scaled)")
    warmup_epochs: int = option(5, "epochs of linear warm-up", least=0)
    cooldown_epochs: int = option(10, "epochs at min_lr behind the schedule; --epochs ends a run before them")
    decay_epochs: float = option(30, "interval of sched=step, epochs")
    decay_rate: float = option(0.1, "factor of sched=step", aliases=("dr",))
    lr_noise: tuple[float, ...] | None = option(None, "noise the rate from this share of the epochs on (to this one)")
    lr_noise_pct: float = option(0.67, "largest noise, as a share of the rate")
    lr_noise_std: float = option(1.0, "standard deviation of the noise")


@dataclass
class EmaConfig:
    model_ema: bool = option(True, "keep an exponential moving average of the weights")
    model_ema_decay: float = option(0.99996, "its decay a step")
    model_ema_force_cpu: bool = option(False, "keep it in host memory")


@dataclass
class RunConfig:
    output_dir: str = option("", "folder for checkpoints, logs and the resolved config; empty: save nothing")
    resume: str = option("", "checkpoint to go on from (or to evaluate); 'auto': output_dir's own if there is one")
    eval: bool = option(False, "only evaluate")
    start_epoch: int | None = option(None, "first epoch; default: where the checkpoint stopped, or 0")
    device: str = option("auto", "auto, cuda, cuda:N or cpu")
    seed: int = option(0, "seed of the weights, the order, the augmentation and the mixing", least=0)
    amp: bool = option(True, "bf16 autocast on a GPU that has it; --no_amp for fp32", aliases=("if-amp",))
    steps_per_epoch: int | None = option(None, "end each epoch after this many steps; default: the whole data", least=1)
    eval_steps: int | None = option(
        None, "evaluate on this many steps' pictures only; default: every picture, once", least=1
    )
    log_every: int = option(50, "steps between two reports", least=1)
    save_every: int | None = option(
        None, "steps between two checkpoints inside an epoch; default: epoch ends only", least=1
    )


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    ema: EmaConfig = field(default_factory=EmaConfig)
    run: RunConfig = field(default_factory=RunConfig)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Plain values by section and name, as YAML and checkpoints hold them."""
        plain = dataclasses.asdict(self)
        return {
            section: {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
            for section, values in plain.items()
        }

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML that ``--config`` reads back."""
        aside = path.with_name(f".{path.name}.tmp")
        aside.write_text(yaml.safe_dump(self.to_dict(), sort_keys=False))
        aside.replace(path)


def load_config(argv: list[str]) -> Config:
    """The settings that a command line asks for.

    Raises:
        UserError: an unknown flag or key, or a value of the wrong type, with the known ones that come close.
    """
    given = vars(_parser().parse_args(argv))
    config = Config()
    path = given.pop("config", None)
    if path is not None:
        _apply_yaml(config, Path(path))
    for section in fields(Config):
        part = getattr(config, section.name)
        for name in given.keys() & {f.name for f in fields(part)}:
            setattr(part, name, given[name])
    _check(config)
    return config


def _check(config: Config) -> None:
    for section in fields(Config):
        part = getattr(config, section.name)
        for f in fields(part):
            value, least, choices = getattr(part, f.name), f.metadata["least"], f.metadata["choices"]
            if value is not None and least is not None and value < least:
                raise UserError(f"{f.name} is {value}, want at least {least}")
            if choices and value not in choices:
                raise UserError(
                    f"{f.name} is {value!r}{did_you_mean(value, choices)}; want one of {', '.join(choices)}"
                )


def _apply_yaml(config: Config, path: Path) -> None:
    try:
        sections = yaml.safe_load(path.read_text()) or {}
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; configs/ holds the recipes") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{path} is no readable YAML: {' '.join(str(error).split())}") from None
    known_sections = [f.name for f in fields(Config)]
    if not isinstance(sections, dict):
        raise UserError(f"{path} holds no sections; the known ones are {', '.join(known_sections)}")
    for section, values in sections.items():
        if section not in known_sections:
            raise UserError(
                f"{path}: unknown section {section!r}{did_you_mean(str(section), known_sections)}; "
                f"the known ones are {', '.join(known_sections)}"
            )
        part = getattr(config, section)
        kinds = typing.get_type_hints(type(part))
        for name, value in (values or {}).items():
            if name not in kinds:
                raise UserError(
                    f"{path}: unknown key {f'{section}.{name}'!r}{did_you_mean(str(name), kinds)}; "
                    f"the known ones are {', '.join(kinds)}"
                )
            setattr(part, name, _convert(value, kinds[name], f"{path}: {section}.{name}"))


def _convert(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`, strictly, but for what YAML gets wrong: it reads ``3e-4`` as a string."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if type(None) in options:
        if value is None:
            return None
        (kind,) = (o for o in options if o is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            inner = typing.get_args(kind)
            if not isinstance(value, (list, tuple)) or (inner[-1] is not Ellipsis and len(value) != len(inner)):
                raise ValueError
            return tuple(_convert(v, inner[0], where) for v in value)
        if kind is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
        if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
            return value
        raise ValueError
    except ValueError:
        name = "a list of numbers" if typing.get_origin(kind) is tuple else f"of type {kind.__name__}"
        raise UserError(f"{where} is {value!r}, want a value {name}") from None


class _KeyValue(argparse.Action):
    """Collects ``name=value`` words into a dict, each value read as YAML."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pairs = {}
        for word in values:
            name, equals, value = word.partition("=")
            if not equals:
                parser.error(f"{option_string} takes name=value words, got {word!r}")
            pairs[name] = yaml.safe_load(value)
        setattr(namespace, self.dest, pairs)


def _parser() -> Parser:
    parser = Parser(
        "python -m vimfast.train",
        "Train or evaluate a Vision Mamba. Settings: defaults < --config YAML < these flags.",
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="YAML", help="recipe to start from; configs/ holds some")
    for section in fields(Config):
        group = parser.add_argument_group(section.name)
        part: Any = section.default_factory
        kinds = typing.get_type_hints(part)
        for f in fields(part):
            _add_flag(group, f, kinds[f.name])
    return parser


def _add_flag(group: Any, f: dataclasses.Field, kind: Any) -> None:
    hyphen = f.name.replace("_", "-")
    names = [hyphen, *f.metadata["aliases"]]
    flags = list(dict.fromkeys(f"--{n}" for name in names for n in (name, name.replace("-", "_"))))
    default = f.default_factory() if callable(f.default_factory) else f.default
    text = f.metadata["help"] + ("" if default in (None, "", {}) else f" [{default}]")
    if kind is bool:
        group.add_argument(*flags, dest=f.name, action="store_true", help=text)
        negative = list(dict.fromkeys([f"--no-{hyphen}", f"--no_{f.name}", f"--no-{f.name}"]))
        group.add_argument(*negative, dest=f.name, action="store_false", help=argparse.SUPPRESS if not default else "")
        return
    if kind is dict:
        group.add_argument(*flags, dest=f.name, nargs="+", action=_KeyValue, metavar="NAME=VALUE", help=text)
        return
    arguments: dict[str, Any] = {"metavar": "|".join(f.metadata["choices"])} if f.metadata["choices"] else {}
    base = next(o for o in typing.get_args(kind) if o is not type(None)) if isinstance(kind, types.UnionType) else kind
    if typing.get_origin(base) is tuple:
        inner = typing.get_args(base)
        arguments |= {"nargs": "+" if inner[-1] is Ellipsis else len(inner), "action": _AsTuple}
        base = inner[0]
    group.add_argument(*flags, dest=f.name, type=base, help=text, **arguments)


class _AsTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))
