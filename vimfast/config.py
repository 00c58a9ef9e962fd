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
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from vimfast import original
from vimfast.cli import Parser
from vimfast.errors import UserError, did_you_mean
from vimfast.files import write_text

RECIPES = Path(__file__).parent / "recipes"


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    aliases: tuple[str, ...] = (),
    choices: tuple[str, ...] | Callable[[], tuple[str, ...]] = (),
) -> Any:
    """A dataclass field that is also a flag: `help` is its ``--help`` line, `aliases` are other spellings.

    Choices may be a function, which is called for a value other than the default only.
    """
    metadata = {"help": help, "least": least, "aliases": aliases, "choices": choices}
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def _backend_names() -> tuple[str, ...]:
    from vimfast_kernels import backend_names  # imports torch, which a command line without this flag can do without

    return backend_names()


@dataclass
class ModelConfig:
    model: str = option("vim_tiny_patch16_224", "name of a Vision Mamba, or of any timm model")
    model_kwargs: dict = option({}, "constructor options for the model, e.g. depth=4 embed_dim=64")
    num_classes: int | None = option(None, "classes of the head; default: as many as the data has", least=0)
    input_size: int = option(224, "side of the square input, pixels", least=1)
    drop: float = option(0.0, "dropout rate after the position embedding", least=0)
    drop_path: float = option(0.1, "stochastic depth rate of the last block", least=0)
    scan_backend: str = option(
        "auto", "kernels of the model: auto, gluon, mamba_ssm, reference", choices=_backend_names
    )
    random_cls_token_position: bool = option(
        False,
        "insert the class token anywhere in training, a new place each step; in evaluation it is the first",
        aliases=("if-random-cls-token-position",),
    )
    random_token_rank: bool = option(
        False, "shuffle the sequence in training, anew each step", aliases=("if-random-token-rank",)
    )
    use_checkpoint: bool = option(False, "recompute activations in backward to save memory")
    torch_compile: bool = option(False, "compile the model; TORCH_COMPILE=1 does the same")
    cuda_graph: bool = option(True, "replay training steps as a CUDA graph where the model allows it")

    def options(self) -> dict[str, Any]:
        """Constructor options of the model that have no argument of their own in every model."""
        options: dict[str, Any] = {"if_random_token_rank": True} if self.random_token_rank else {}
        if self.random_cls_token_position:  # which a token held in the middle would be deaf to
            options |= {"if_random_cls_token_position": True, "use_middle_cls_token": False}
        return options | self.model_kwargs


@dataclass
class DataConfig:
    data_path: str = option("", "shards from vimfast-prepare, or a folder tree with train/ and val/")
    batch_size: int = option(64, "training pictures a step on each GPU (or process)", least=1)
    eval_batch_size: int | None = option(
        None, "validation pictures a step on each GPU; default: as in training", least=1
    )
    repeated_aug: bool = option(True, "three augmented copies of each drawn picture, as DeiT and Vim do")
    repeated_aug_on: str = option(
        "all-ranks",
        "where the copies go: spread as DeiT does, or together, which decodes each picture once",
        choices=("all-ranks", "one-rank"),
    )
    order: str = option(
        "permutation",
        "of the training pictures: of all of them, or of --order-window shards at a time",
        choices=("permutation", "window"),
    )
    order_window: int = option(64, "shards that --order window shuffles together; they should fit in memory", least=1)
    scale: tuple[float, float] = option((0.08, 1.0), "area of a training crop, as a share of the picture: MIN MAX")
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "width over height of a training crop: MIN MAX")
    hflip: float = option(0.5, "probability of a horizontal flip in training", least=0)
    train_interpolation: str = option(
        "bicubic", "filter of crops and warps in training", choices=("bicubic", "bilinear", "random")
    )
    eval_crop_ratio: float = option(
        0.875, "validation resizes the short side to input size / this, then crops; 1 for inputs up to 32 pixels"
    )
    num_workers: int | None = option(
        None, "decoding threads of each process; default: as many as help, of the cores it may use", least=1
    )
    decoder: str = option(
        "auto",
        "the GPU's JPEG engine, its ordinary cores, or the CPU; auto: what slows training least on this machine",
        choices=("auto", "hardware", "cuda", "cpu"),
    )
    prefetch: int = option(3, "batches decoded ahead", least=1)
    readahead: int = option(4, "batches read ahead of those from disk", least=1)
    on_bad_image: str = option(
        "stop", "at a picture that does not decode: end the run, or go on without it", choices=("stop", "skip")
    )


@dataclass
class AugmentConfig:
    aa: str = option("rand-m9-mstd0.5-inc1", "RandAugment in timm's words; none or '' for none")
    color_jitter: float = option(
        0.3, "change brightness, contrast and saturation by up to this; only where --aa is off", least=0
    )
    three_augment: bool = option(
        False, "DeiT III's grey, solarize or blur, and --color-jitter; no --aa, no erasing", aliases=("ThreeAugment",)
    )
    src: bool = option(False, "simple random crop: short side to the input size, shifted by up to 4 pixels")
    reprob: float = option(0.25, "probability of erasing a box", least=0)
    remode: str = option(
        "pixel", "what an erased box holds: noise, black or one colour", choices=("pixel", "const", "rand")
    )
    recount: int = option(1, "erase up to this many boxes", least=1)


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
    global_batch_size: int | None = option(
        None, "pictures of an update, on all GPUs together; --batch-size is then the most a GPU takes at once", least=1
    )
    skip_limit: int = option(
        20, "steps in a row that may be skipped, their gradients being no numbers, before the run stops", least=1
    )


@dataclass
class FinetuneConfig:
    finetune: str = option("", "start from these weights, whatever they were trained on: a checkpoint, or safetensors")
    pos_embed_resample: str = option(
        "patches",
        "at another input size or stride, resample the positions of the patches alone, or as the original does, which"
        " takes the class token for the first of the sequence",
        choices=("patches", "original"),
    )
    attn_only: bool = option(False, "train the mixers (or a transformer's attention), head and position embedding only")
    freeze_layers: int = option(
        0, "keep the embedding and the first so many blocks as they are; all of them: train the head alone", least=0
    )


@dataclass
class DistillConfig:
    distillation_type: str = option(
        "none", "learn from a teacher: its probabilities, or its answer", choices=("none", "soft", "hard")
    )
    teacher_model: str = option("regnety_160", "any timm model; it sees the pictures that the student sees")
    teacher_path: str = option("", "the teacher's checkpoint, or safetensors")
    distillation_alpha: float = option(0.5, "the teacher's share of the loss", least=0)
    distillation_tau: float = option(1.0, "temperature of the probabilities")
    cosub: bool = option(False, "train two draws of stochastic depth on each picture to agree (DeiT III's cosub)")


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
    stall_timeout: float = option(
        600.0, "seconds without progress after which the run ends naming the process at fault", least=1
    )


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    mix: MixConfig = field(default_factory=MixConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
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
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))


class Batches(NamedTuple):
    """How an update's pictures are cut up."""

    batch_size: int  # pictures on each GPU at once
    accum_steps: int  # batches on each GPU that make one update


def plan_batches(config: Config, world: int) -> Batches:
    """Batch size and accumulation steps for so many GPUs (processes).

    Without ``global_batch_size`` they are what the settings say. With it, the global batch stays the same on any number
    of GPUs: in ``accum_steps`` if given, else in as few equal steps as need no larger batch than ``batch_size``.

    Raises:
        UserError: the global batch cannot be shared out equally.
    """
    most, accum, wanted = config.data.batch_size, config.optim.accum_steps, config.optim.global_batch_size
    if wanted is None:
        return Batches(most, accum)
    own, rest = divmod(wanted, world)
    if rest or own == 0 or own % accum:
        parts = f"{world} GPUs" + (f" x {accum} accumulation steps" if accum > 1 else "")
        unit = world * accum
        raise UserError(
            f"--global-batch-size {wanted} cannot be shared out to {parts}; give a multiple of {unit},"
            f" such as {max(round(wanted / unit), 1) * unit}"
        )
    if accum == 1:
        accum = next(n for n in range(-(-own // most), own + 1) if own % n == 0)
    return Batches(own // accum, accum)


def load_config(argv: list[str]) -> Config:
    """The settings that a command line asks for.

    Raises:
        UserError: an unknown flag or key, or a value of the wrong type, with the known ones that come close.
    """
    given = vars(_parser().parse_args(argv))
    config = Config()
    path = given.pop("config", None)
    if path is not None:
        _apply_yaml(config, find_recipe(path))
    for section in fields(Config):
        part = getattr(config, section.name)
        for name in given.keys() & {f.name for f in fields(part)}:
            setattr(part, name, given[name])
    _check(config)
    return config


def recipes() -> dict[str, Path]:
    """The recipes that come with this package, by name."""
    return {path.stem: path for path in sorted(RECIPES.glob("*.yaml"))}


def find_recipe(word: str) -> Path:
    """The file that ``--config`` means: a recipe's name, or a path, which has a slash or an extension.

    Raises:
        UserError: there is no such recipe or no such file.
    """
    path, known = Path(word), recipes()
    if "/" not in word and not path.suffix and (word in known or not path.is_file()):
        if word not in known:
            raise UserError(f"there is no recipe {word!r}{did_you_mean(word, known)}", _known(known))
        return known[word]
    if not path.exists():
        raise UserError(f"{path} does not exist", _known(known, path.stem))
    return path


def _known(names: Iterable[str], meant: str = "") -> str:
    hint = f"--config {meant} is the recipe of that name; " if meant in names else ""
    return f"{hint}the recipes are {', '.join(names)}; any other YAML file goes by its path"


def _check(config: Config) -> None:
    for section in fields(Config):
        part = getattr(config, section.name)
        for f in fields(part):
            value, least, choices = getattr(part, f.name), f.metadata["least"], f.metadata["choices"]
            if value is not None and least is not None and value < least:
                raise UserError(f"{f.name} is {value}, want at least {least}")
            if callable(choices):
                choices = () if value == f.default else choices()
            if choices and value not in choices:
                raise UserError(
                    f"{f.name} is {value!r}{did_you_mean(value, choices)}; want one of {', '.join(choices)}"
                )


def _apply_yaml(config: Config, path: Path) -> None:
    try:
        sections = yaml.safe_load(path.read_text()) or {}
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
    parser.add_argument(
        "--config", metavar="RECIPE", help=f"start from a recipe ({', '.join(recipes())}), or a YAML file"
    )
    original.add_flags(parser)
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
    choices = f.metadata["choices"]
    arguments: dict[str, Any] = {"metavar": "|".join(choices)} if choices and not callable(choices) else {}
    base = next(o for o in typing.get_args(kind) if o is not type(None)) if isinstance(kind, types.UnionType) else kind
    if typing.get_origin(base) is tuple:
        inner = typing.get_args(base)
        arguments |= {"nargs": "+" if inner[-1] is Ellipsis else len(inner), "action": _AsTuple}
        base = inner[0]
    group.add_argument(*flags, dest=f.name, type=base, help=text, **arguments)


class _AsTuple(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))
