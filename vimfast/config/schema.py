"""The settings of a run: one dataclass for each section, named after the part that it goes to.

A field is at once a YAML key (under its section's name) and a command-line flag. Names and defaults are those of
hustvl/Vim's ``main.py`` where it has them, so its command lines carry over.
"""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml

from vimfast.config.choices import (
    Auto,
    CopiesOn,
    Decoder,
    Distillation,
    EraseMode,
    ImageOrder,
    Interpolation,
    MixMode,
    OnBadImage,
    OnDivergence,
    PositionResampling,
    Schedule,
)
from vimfast.errors import UserError
from vimfast.files import write_text
from vimfast.image_size import ImageSize, SizeLike

_PREFIXES = {"": 1} | {
    letter + binary: (1024 if binary else 1000) ** power
    for power, letter in enumerate("kmgt", 1)
    for binary in ("", "i")
}


def option(
    default: Any,
    help: str,
    *,
    least: float | None = None,
    most: float | None = None,
    aliases: tuple[str, ...] = (),
    choices: Callable[[], tuple[str, ...]] | None = None,
    neutral: bool = False,
    path: bool = False,
    words: bool = False,
) -> Any:
    """A dataclass field that is also a flag: `help` is its ``--help`` line, `aliases` are other spellings.

    The choices of a field are its ``Literal`` type; where only the run knows them, `choices` returns them. It is called
    for a value other than the default only. `neutral`: whatever its value, a run trains the same.
    `path`: a leading ``~`` is the home folder. `words`: several may follow the flag, and are joined by spaces.
    """
    metadata = {
        "help": help,
        "least": least,
        "most": most,
        "aliases": aliases,
        "choices": choices,
        "neutral": neutral,
        "path": path,
        "words": words,
    }
    if isinstance(default, dict):
        return field(default_factory=lambda: dict(default), metadata=metadata)
    return field(default=default, metadata=metadata)


_CALLED = {bool: "true or false", int: "an integer", float: "a number", str: "text", dict: "settings by name"}


class Kind(NamedTuple):
    """The values that a setting takes, as its annotation says."""

    base: type  # bool, int, float, str or dict
    optional: bool  # None is a value too
    length: int = 1  # so many of `base`, in a tuple unless it is 1; 0: any number
    choices: tuple[str, ...] = ()
    words: tuple[str, ...] = ()  # that stand for a value of `base`
    size: bool = False  # one number, or two for height and width

    @property
    def wanted(self) -> str:
        """What to say that a value must be, or each of several."""
        if self.choices:
            return f"one of {', '.join(self.choices)}"
        return " or ".join([_CALLED[self.base], *self.words])

    @classmethod
    def of(cls, annotation: Any) -> Kind:
        if annotation == SizeLike:
            return cls(int, False, size=True)
        union = typing.get_origin(annotation) in (types.UnionType, typing.Union)
        options = [o for o in typing.get_args(annotation) if o is not type(None)] if union else [annotation]
        optional = union and type(None) in typing.get_args(annotation)
        kind = next((o for o in options if typing.get_origin(o) is not Literal), options[0])
        words = tuple(word for o in options if o is not kind for word in typing.get_args(o))
        origin, inner = typing.get_origin(kind), typing.get_args(kind)
        if origin is Literal:
            return cls(str, optional, choices=inner)
        if origin is tuple:
            return cls(inner[0], optional, length=0 if inner[-1] is Ellipsis else len(inner))
        return cls(origin or kind, optional, words=words)


_KINDS: dict[type, Mapping[str, Kind]] = {}  # of sections that were asked for: each setting that is given asks again


def kinds(section: type) -> Mapping[str, Kind]:
    """The kind of each field of a section."""
    if section not in _KINDS:
        _KINDS[section] = {name: Kind.of(hint) for name, hint in typing.get_type_hints(section).items()}
    return _KINDS[section]


def _backend_names() -> tuple[str, ...]:
    from vimfast_kernels import backend_names  # imports torch, which a command line without this flag can do without

    return backend_names()


@dataclass(frozen=True)
class StageConfig:
    """Some epochs of a run, and the settings that are others there than in the run as a whole.

    Args:
        epochs: how many; None: as `share` says.
        share: of the run's epochs, in (0, 1]; None, like `epochs`: what the stages before leave of it.
        changes: values by the names of settings, those of :data:`~vimfast.config.stages.MAY_CHANGE`.
    """

    epochs: int | None = None
    share: float | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As a YAML file has it."""
        own = {name: value for name, value in (("epochs", self.epochs), ("share", self.share)) if value is not None}
        return {**own, **_plain(self.changes)}


def _plain(value: Any) -> Any:
    """What YAML and checkpoints hold of a setting's value."""
    if isinstance(value, StageConfig):
        return value.to_dict()
    if isinstance(value, tuple):
        return [_plain(part) for part in value]
    return {name: _plain(part) for name, part in value.items()} if isinstance(value, Mapping) else value


@dataclass
class ModelConfig:
    model: str = option("vim_tiny_patch16_224", "name of a Vision Mamba, or of any timm model")
    model_kwargs: dict[str, Any] = option({}, "constructor options for the model, e.g. depth=4 embed_dim=64")
    num_classes: int | None = option(
        None, "classes of the head; default: as many as the data has", least=0, neutral=True
    )
    input_size: SizeLike = option(224, "side of the square input, pixels; or its height and width", least=1)
    in_chans: int = option(3, "channels that the model sees: 3, or 1 for grey images")
    drop: float = option(0.0, "dropout rate after the position embedding", least=0, most=1)
    drop_path: float = option(0.1, "stochastic depth rate of the last block", least=0, most=1)
    scan_backend: str = option(
        "auto",
        "kernels of the model: auto, gluon, mamba_ssm, llvm, reference, portable",
        choices=_backend_names,
        neutral=True,
    )
    random_cls_token_position: bool = option(
        False,
        "insert the class token anywhere in training, a new place each step; in evaluation it is the first",
        aliases=("if-random-cls-token-position",),
    )
    random_token_rank: bool = option(
        False, "shuffle the sequence in training, again at each step", aliases=("if-random-token-rank",)
    )
    use_checkpoint: bool = option(False, "recompute activations in backward to save memory", neutral=True)
    torch_compile: bool | None = option(
        None,
        "compile the model for training, which takes a minute before the first step; TORCH_COMPILE=1 does the same; "
        "default: timm's vision transformers on a GPU; --no-torch-compile for none",
        neutral=True,
    )
    cuda_graph: bool = option(
        True, "replay training steps and evaluations as CUDA graphs where the model allows it", neutral=True
    )

    @property
    def size(self) -> ImageSize:
        """Of the images that the model is built for."""
        return ImageSize.of(self.input_size)

    def options(self) -> dict[str, Any]:
        """Constructor options of the model that have no argument of their own in every model."""
        options: dict[str, Any] = {"if_random_token_rank": True} if self.random_token_rank else {}
        if self.random_cls_token_position:  # which a token held in the middle would be deaf to
            options |= {"if_random_cls_token_position": True, "use_middle_cls_token": False}
        if self.in_chans != 3:
            options["in_chans"] = self.in_chans
        return options | self.model_kwargs


@dataclass
class DataConfig:
    data_path: str = option(
        "",
        "shards from vimfast-prepare, here or in a store (s3://, gs://, az://, https:// and more), or a folder tree"
        " with train/ and val/; several are mixed by weight: a:0.7 b:0.3",
        neutral=True,
        path=True,
        words=True,
    )
    cache_dir: str = option(
        "", "folder on a local disk for the shards of a store; default: ~/.cache", neutral=True, path=True
    )
    cache_size: str = option(
        "", "most bytes of shards in it, such as 200GB; 0: keep none; default: room for all of the data", neutral=True
    )
    class_map: str = option(
        "",
        "class folders in the order of their numbers, one on each line, or JSON of names and numbers; default: sorted",
        path=True,
    )
    batch_size: int | Auto = option(
        64, "training images a step on each GPU (or process); auto: as many as fit into its memory", least=1
    )
    eval_batch_size: int | None = option(
        None, "validation images a step on each GPU; default: as in training", least=1, neutral=True
    )
    repeated_aug: bool = option(True, "three augmented copies of each drawn image, as DeiT and Vim do")
    repeated_aug_on: CopiesOn = option(
        "all-ranks", "where the copies go: spread as DeiT does, or together, which decodes each image once"
    )
    order: ImageOrder = option(
        "permutation", "order of the training images: drawn over all of them, or over --order-window shards at a time"
    )
    order_window: int = option(64, "shards that --order window shuffles together; they should fit in memory", least=1)
    scale: tuple[float, float] = option((0.08, 1.0), "area of a training crop, as a share of the image: MIN MAX")
    ratio: tuple[float, float] = option((3 / 4, 4 / 3), "width over height of a training crop: MIN MAX")
    hflip: float = option(0.5, "probability of a horizontal flip in training", least=0, most=1)
    train_interpolation: Interpolation = option("bicubic", "filter of crops and warps in training")
    eval_crop_ratio: float = option(
        0.875, "validation resizes the short side to input size / this, then crops; 1 for inputs up to 32 pixels"
    )
    num_workers: int | None = option(
        None,
        "decoding threads of each process; default: as many as help, of the cores it may use",
        least=1,
        neutral=True,
    )
    decoder: Decoder = option(
        "auto",
        "the GPU's JPEG engine, its ordinary cores, or the CPU; auto: what slows training least on this machine",
        neutral=True,
    )
    prefetch: int = option(3, "batches decoded ahead", least=1, neutral=True)
    readahead: int = option(4, "batches read ahead of those from disk", least=1, neutral=True)
    on_bad_image: OnBadImage = option("stop", "at an image that does not decode: end the run, or continue without it")

    @property
    def cache_bytes(self) -> int | None:
        """Of the cache; None: as many as the data has.

        Raises:
            UserError: the setting is not a size.
        """
        if not self.cache_size:
            return None
        number = r"\d+(?:\.\d+)?|\d{1,3}(?:,\d{3})+"  # 1,234 is how sentences write it
        found = re.fullmatch(rf"({number}) ?([kmgt]?i?)b?", self.cache_size.strip().lower())
        if found is None or found[2] not in _PREFIXES:
            raise UserError(f"--cache-size is {self.cache_size!r}", "give a size such as 500MB or 200GB")
        return int(float(found[1].replace(",", "")) * _PREFIXES[found[2]])


@dataclass
class AugmentConfig:
    """What is done to a training image after crop and flip; by default, what Vision Mamba is trained with.

    ``docs/flags.md`` explains the fields, which are flags of a run.
    """

    aa: str = option("rand-m9-mstd0.5-inc1", "RandAugment in timm's words; none or '' for none")
    color_jitter: float = option(
        0.3, "change brightness, contrast and saturation by up to this; only where --aa is off", least=0
    )
    three_augment: bool = option(
        False, "DeiT III's grey, solarize or blur, and --color-jitter; no --aa, no erasing", aliases=("ThreeAugment",)
    )
    src: bool = option(False, "simple random crop: short side to the input size, shifted by up to 4 pixels")
    reprob: float = option(0.25, "probability of erasing a box", least=0, most=1)
    remode: EraseMode = option("pixel", "what an erased box holds: noise, black or one colour")
    recount: int = option(1, "erase up to this many boxes", least=1)


@dataclass
class MixConfig:
    mixup: float = option(0.8, "mixup alpha; 0 turns it off", least=0)
    cutmix: float = option(1.0, "cutmix alpha; 0 turns it off", least=0)
    cutmix_minmax: tuple[float, float] | None = option(None, "cutmix box side as a share of the image: MIN MAX")
    mixup_prob: float = option(1.0, "probability of mixing at all", least=0, most=1)
    mixup_switch_prob: float = option(0.5, "probability of cutmix where both are on", least=0, most=1)
    mixup_mode: MixMode = option("batch", "one draw for each batch, pair or element")
    mixup_group: int | None = option(
        None,
        "images of a batch that are mixed among themselves, as if they were a batch; what is left over at its end is a"
        " smaller group; default: all of it",
        least=2,
    )
    smoothing: float = option(0.1, "label smoothing", least=0, most=1)
    soft_targets: str = option(
        "",
        "targets of the training images in place of their labels: a .npy file of rows, with a .csv beside it that says"
        " whose they are; smoothed and mixed as labels are",
        path=True,
    )
    bce_loss: bool = option(False, "binary cross entropy on every class a target holds (smoothing is then unused)")


@dataclass
class OptimConfig:
    opt: str = option(
        "adamw",
        "any optimizer of timm's factory; muon is ours: orthogonal steps for hidden matrices, AdamW's for the rest, at"
        " one learning rate",
    )
    opt_eps: float | None = option(1e-8, "epsilon of the optimizer")
    opt_betas: tuple[float, ...] | None = option(None, "betas of the optimizer; default: its own")
    momentum: float = option(0.9, "momentum of SGD", least=0)
    weight_decay: float = option(
        0.05, "weight decay; 1-D tensors, biases, position and class tokens have none", least=0
    )
    layer_decay: float | None = option(
        None,
        "factor from the learning rate of a layer to that of the layer before it, 0.65 to 0.9 for finetuning; default:"
        " one rate for all",
        least=0,
        most=1,
    )
    decay_a_log: bool = option(True, "decay A_log too, as the published runs did")
    clip_grad: float | None = option(None, "largest gradient norm; default: no clipping")
    lr: float = option(5e-4, "learning rate for a global batch of 512; scaled in proportion to the batch", least=0)
    unscale_lr: bool = option(False, "take --lr as it is, whatever the batch")
    accum_steps: int = option(1, "batches of --batch-size on each GPU that make one update", least=1)
    global_batch_size: int | None = option(
        None, "images of an update, on all GPUs together; --batch-size is then the most a GPU takes at once", least=1
    )
    skip_limit: int = option(
        20,
        "steps in a row that may be skipped because of non-finite gradients, before the run has diverged",
        least=1,
        neutral=True,
    )
    on_divergence: OnDivergence = option(
        "stop",
        "stop, or roll back: resume from the last good checkpoint with half the learning rate and the rest of its "
        "epoch in another order",
        neutral=True,
    )
    max_rollbacks: int = option(3, "times that a run is rolled back before it stops", least=1, neutral=True)


@dataclass
class FinetuneConfig:
    finetune: str = option(
        "",
        "start from these weights, whatever they were trained on: a checkpoint, a run folder, or safetensors",
        neutral=True,
        path=True,
    )
    pos_embed_resample: PositionResampling = option(
        "patches",
        "at another input size or stride, resample the positions of the patches alone, or as the original does, which"
        " takes the class token for the first of the sequence",
    )
    attn_only: bool = option(False, "train the mixers (or a transformer's attention), head and position embedding only")
    freeze_layers: int = option(
        0, "keep the embedding and the first so many blocks as they are; all of them: train the head alone", least=0
    )


@dataclass
class DistillConfig:
    distillation_type: Distillation = option("none", "learn from a teacher: its probabilities, or its answer")
    teacher_model: str = option("regnety_160", "any timm model; it sees the images that the student sees")
    teacher_path: str = option("", "the teacher's checkpoint, or safetensors", neutral=True, path=True)
    distillation_alpha: float = option(0.5, "the teacher's share of the loss", least=0)
    distillation_tau: float = option(1.0, "temperature of the probabilities")
    cosub: bool = option(False, "train two draws of stochastic depth on each image to agree (DeiT III's cosub)")


@dataclass
class ScheduleConfig:
    epochs: int = option(300, "epochs to train", least=1)
    stages: tuple[StageConfig, ...] = option(
        (),
        "the curriculum: a list of stages, each with its epochs, or share of them, and settings of its own, such as"
        " input_size (docs/curriculum.md)",
    )
    sched: Schedule = option("cosine", "schedule of the learning rate, by timm's factory")
    sched_on_updates: bool = option(False, "move the learning rate every step instead of every epoch")
    warmup_lr: float = option(1e-6, "first learning rate of the warm-up (not scaled)")
    min_lr: float = option(1e-5, "last learning rate (not scaled)")
    warmup_epochs: int = option(5, "epochs of linear warm-up; at most one less than --epochs", least=0)
    cooldown_epochs: int = option(10, "epochs at min_lr after the schedule; --epochs ends a run before them")
    decay_epochs: float = option(30, "interval of sched=step, epochs")
    decay_rate: float = option(0.1, "factor of sched=step", aliases=("dr",))
    lr_noise: tuple[float, ...] | None = option(None, "noise the rate from this share of the epochs on (to this one)")
    lr_noise_pct: float = option(0.67, "largest noise, as a share of the rate")
    lr_noise_std: float = option(1.0, "standard deviation of the noise")


@dataclass
class EmaConfig:
    model_ema: bool = option(True, "keep an exponential moving average of the weights")
    model_ema_decay: float = option(0.99996, "its decay a step")
    model_ema_warmup: bool = option(
        False, "its decay grows to that with the steps n, as 1 - (1 + n)^(-2/3), so that short runs have an average too"
    )
    model_ema_force_cpu: bool = option(False, "keep it in host memory", neutral=True)


@dataclass
class RunConfig:
    output_dir: str = option(
        "", "folder for checkpoints, logs and the resolved config; empty: save nothing", neutral=True, path=True
    )
    resume: str = option(
        "",
        "checkpoint or run folder to resume from (or to evaluate); 'auto': output_dir's own if there is one",
        neutral=True,
        path=True,
    )
    eval: bool = option(False, "only evaluate", neutral=True)
    start_epoch: int | None = option(
        None, "first epoch; default: where the checkpoint stopped, or 0", least=0, neutral=True
    )
    dry_run: bool = option(False, "print what the run would do, and stop before the first step", neutral=True)
    device: str = option("auto", "auto, cuda, cuda:N or cpu", neutral=True)
    seed: int = option(0, "seed of the weights, the order, the augmentation and the mixing", least=0)
    amp: bool = option(True, "bf16 autocast on a GPU that has it; --no-amp for fp32", aliases=("if-amp",))
    steps_per_epoch: int | None = option(None, "end each epoch after this many steps; default: the whole data", least=1)
    eval_every: int = option(1, "epochs from one evaluation to the next; the last epoch always has one", least=1)
    eval_steps: int | None = option(
        None, "evaluate on this many steps' images only; default: every image, once", least=1
    )
    log_every: int = option(50, "steps between two reports", least=1, neutral=True)
    csv: bool = option(False, "write log.csv too: what log.txt says, as a table", neutral=True)
    wandb: bool = option(
        False,
        "log to Weights & Biases too, as its environment variables say: WANDB_MODE=offline sends nothing",
        neutral=True,
    )
    save_every: int | None = option(
        None, "steps between two checkpoints inside an epoch; default: epoch ends only", least=1, neutral=True
    )
    save_minutes: float | None = option(
        None, "minutes between two checkpoints inside an epoch; default: epoch ends only", least=0, neutral=True
    )
    keep_checkpoints: int = option(
        2,
        "checkpoints to keep, the last one included; a damaged one is passed over by --resume auto",
        least=1,
        neutral=True,
    )
    stall_timeout: float = option(
        600.0, "seconds without progress after which the run ends naming the process at fault", least=1, neutral=True
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
        sections = {section.name: getattr(self, section.name) for section in fields(self)}
        return {
            section: {f.name: _plain(getattr(part, f.name)) for f in fields(part)} for section, part in sections.items()
        }

    def changed_since(self, earlier: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, Any, Any]]:
        """(setting, value then, value now) of what trains otherwise than the settings of :meth:`to_dict` in `earlier`.

        Settings that `earlier` does not know are left out.
        """
        now = self.to_dict()
        return [
            (f"{section.name}.{f.name}", earlier[section.name][f.name], now[section.name][f.name])
            for section in fields(self)
            for f in fields(getattr(self, section.name))
            if f.name in earlier.get(section.name, {})
            and not f.metadata["neutral"]
            and earlier[section.name][f.name] != now[section.name][f.name]
        ]

    def save(self, path: Path) -> None:
        """Write the resolved settings as YAML that ``--config`` reads back."""
        write_text(path, yaml.safe_dump(self.to_dict(), sort_keys=False))
