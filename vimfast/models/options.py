"""The constructor options of a Vision Mamba, under hustvl/Vim's names, in groups of what they are about."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Literal, TypeVar

from vimfast.errors import UserError, did_you_mean

BIMAMBA_TYPES = ("none", "v1", "v2")
FINAL_POOL_TYPES = ("none", "mean", "max", "all")
GLOBAL_POOLS = ("", "token", "avg")  # timm's words

# Of hustvl/Vim, and without effect here: add and norm are always one op, the residual is always fp32, and the grid
# follows from the sizes.
IGNORED = ("fused_add_norm", "residual_in_fp32", "ft_seq_len")

_TYPES = {"int": (Integral, "an integer"), "float": (Real, "a number"), "bool": (bool, "true or false")}
_MAY_BE_ZERO = ("num_classes", "depth")  # of the integers: all others are at least 1

T = TypeVar("T")


@dataclass(frozen=True)
class PatchOptions:
    """The patch embedding.

    Args:
        img_size: height and width of the images, or the one number for both.
        dynamic_img_size: take images of other sizes too; positions are resampled for them in each pass.
        patch_size, stride: in pixels.
        channels: of the images.
    """

    img_size: int | tuple[int, int] = 224
    dynamic_img_size: bool = False
    patch_size: int = 16
    stride: int = 16
    channels: int = 3

    @property
    def size(self) -> tuple[int, int]:
        size = self.img_size
        return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclass(frozen=True)
class PositionOptions:
    """Positions.

    Args:
        if_abs_pos_embed: learned position embedding, class tokens included.
        drop_rate: dropout after it, and only with it.
        if_rope, if_rope_residual: rotary position before each block, on the residual too; class tokens do not turn.
        pt_hw_seq_len: patches per side for which rotary positions are counted.
    """

    if_abs_pos_embed: bool = True
    drop_rate: float = 0.0
    if_rope: bool = False
    if_rope_residual: bool = False
    pt_hw_seq_len: int = 14


@dataclass(frozen=True)
class SequenceOptions:
    """Class tokens, and the order of the sequence.

    Args:
        if_cls_token: one class token, which the head reads; in the middle with ``use_middle_cls_token``, else first.
        use_double_cls_token: one at either end instead; the head reads their mean.
        if_random_cls_token_position: in training, insert the class token anywhere (a new place each step); needs
            ``use_middle_cls_token=False``.
        if_random_token_rank: in training, shuffle the sequence each step.
        flip_img_sequences_ratio: how often the whole sequence is reversed, in evaluation too.
    """

    if_cls_token: bool = True
    use_double_cls_token: bool = False
    use_middle_cls_token: bool = True
    if_random_cls_token_position: bool = False
    if_random_token_rank: bool = False
    flip_img_sequences_ratio: float = -1.0

    def __post_init__(self) -> None:
        single_token = self.if_cls_token and not self.use_double_cls_token
        if self.if_random_cls_token_position and (self.use_middle_cls_token or not single_token):
            raise UserError(
                "if_random_cls_token_position needs a single class token that is not held in the middle",
                "add use_middle_cls_token=False",
            )


@dataclass(frozen=True)
class ScanOptions:
    """Further options of a mixer, those of ``ssm_cfg``.

    Args:
        d_conv: taps of the convolution.
        expand: inner width, in widths of the model.
        dt_rank: of the time step's projection; ``auto``: a sixteenth of the width.
        dt_min, dt_max, dt_init_floor: initial time steps, drawn log-uniformly, and the least of them.
        dt_init, dt_scale: how the time step's projection begins, and a factor of its size.
        conv_bias, bias: of the convolution, and of the outer projections.
    """

    d_conv: int = 4
    expand: int = 2
    dt_rank: int | Literal["auto"] = "auto"
    dt_min: float = 1e-3
    dt_max: float = 1e-1
    dt_init: Literal["random", "constant"] = "random"
    dt_scale: float = 1.0
    dt_init_floor: float = 1e-4
    conv_bias: bool = True
    bias: bool = False

    def __post_init__(self) -> None:
        if self.dt_init not in ("random", "constant"):
            raise UserError(f"dt_init is {self.dt_init!r}", "it must be 'random' or 'constant'")


@dataclass(frozen=True)
class MixerOptions:
    """The mixer of each block.

    Args:
        d_state: state size N of the scan.
        bimamba_type: ``none``, ``v1`` or ``v2``, see the mixer.
        if_bimamba: the same as ``bimamba_type="v1"``.
        if_divide_out: halve the sum of v2's directions.
        init_layer_scale: start value of a learned scale on each mixer's output; None for none.
        scan_backend: one of :func:`vimfast_kernels.backend_names`, for all ops of the blocks.
        ssm_cfg: :class:`ScanOptions` by name.
    """

    d_state: int = 16
    bimamba_type: str = "v2"
    if_bimamba: bool = False
    if_divide_out: bool = True
    init_layer_scale: float | None = None
    scan_backend: str = "auto"
    ssm_cfg: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.bimamba_type not in BIMAMBA_TYPES:
            raise UserError(f"bimamba_type is {self.bimamba_type!r}", f"it must be one of {', '.join(BIMAMBA_TYPES)}")

    @property
    def kind(self) -> str:
        return "v1" if self.if_bimamba else self.bimamba_type

    @property
    def scan(self) -> ScanOptions:
        return _whole(ScanOptions, self.ssm_cfg or {}, "ssm_cfg")


@dataclass(frozen=True)
class InitialValues:
    """How the output projections begin, those of ``initializer_cfg``.

    Args:
        initializer_range: of embedding tables, which this model has none of.
        rescale_prenorm_residual: so that the residual's variance does not grow with depth.
        n_residuals_per_layer: for that.
    """

    initializer_range: float = 0.02
    rescale_prenorm_residual: bool = True
    n_residuals_per_layer: int = 1


@dataclass(frozen=True)
class StackOptions:
    """The blocks, and the norms in and after them.

    Args:
        depth, embed_dim: blocks, and width C.
        drop_path_rate: stochastic depth: block i drops the output of the one before at linspace(0, rate)[i - 1], the
            last norm that of the last block at the full rate.
        if_bidirectional: even blocks read the sequence forward, odd ones backward, and each pair is summed.
        norm_epsilon, rms_norm: of the norms; LayerNorm if not rms_norm.
        initializer_cfg: :class:`InitialValues` by name.
    """

    depth: int = 24
    embed_dim: int = 192
    drop_path_rate: float = 0.1
    if_bidirectional: bool = False
    norm_epsilon: float = 1e-5
    rms_norm: bool = True
    initializer_cfg: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.if_bidirectional and self.depth % 2:
            raise UserError(f"if_bidirectional pairs the blocks, and depth {self.depth} is odd", "make it even")

    @property
    def initial(self) -> InitialValues:
        return _whole(InitialValues, self.initializer_cfg or {}, "initializer_cfg")


@dataclass(frozen=True)
class HeadOptions:
    """The head.

    Args:
        num_classes: 0 for features.
        final_pool_type: what the head reads without a class token: ``none`` the last token, ``mean`` their mean,
            ``max`` the largest logit over all, ``all`` each of them (logits [B, M, K]).
        global_pool: what the head reads in timm's words: ``token`` the class tokens' mean, ``avg`` the patches' mean,
            ``""`` all tokens (logits [B, M, K]). None: the class tokens where there are any, else ``final_pool_type``.
    """

    num_classes: int = 1000
    final_pool_type: str = "none"
    global_pool: str | None = None

    def __post_init__(self) -> None:
        known_pool(self.final_pool_type)
        if self.global_pool is not None:
            known_global_pool(self.global_pool)


@dataclass(frozen=True)
class VimOptions:
    """All of them."""

    patches: PatchOptions
    positions: PositionOptions
    sequence: SequenceOptions
    stack: StackOptions
    mixer: MixerOptions
    head: HeadOptions

    def __post_init__(self) -> None:
        if self.head.global_pool == "token" and not self.sequence.if_cls_token:
            raise UserError("global_pool is 'token', and if_cls_token=False leaves none", "take 'avg' or ''")
        width = self.stack.embed_dim
        if self.positions.if_rope and width % 4:
            raise UserError(f"if_rope turns pairs of half the channels: embed_dim {width} must be a multiple of 4")

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> VimOptions:
        """From options by their own names.

        Raises:
            UserError: an option does not exist, its value is of the wrong type or out of range, or options contradict
                each other.
        """
        _refuse_unknown(given, {*IGNORED}.union(*map(_names, _GROUPS)), "a Vision Mamba")
        return cls(
            _part(PatchOptions, given),
            _part(PositionOptions, given),
            _part(SequenceOptions, given),
            _part(StackOptions, given),
            _part(MixerOptions, given),
            _part(HeadOptions, given),
        )


_GROUPS = (PatchOptions, PositionOptions, SequenceOptions, StackOptions, MixerOptions, HeadOptions)


def check_values(given: Mapping[str, Any]) -> None:
    """Check the type and range of the options among `given`; other names are passed over.

    Raises:
        UserError: the first value that is of the wrong type or out of range.
    """
    for group in _GROUPS:
        _check(group, given)


def known_global_pool(name: str) -> str:
    if name not in GLOBAL_POOLS:
        raise UserError(f"global_pool is {name!r}", f"it must be one of {', '.join(map(repr, GLOBAL_POOLS))}")
    return name


def known_pool(name: str) -> str:
    if name not in FINAL_POOL_TYPES:
        raise UserError(f"final_pool_type is {name!r}", f"it must be one of {', '.join(FINAL_POOL_TYPES)}")
    return name


def _whole(group: type[T], given: Mapping[str, Any], owner: str) -> T:
    """A group of which all that is given must be options."""
    _refuse_unknown(given, _names(group), owner)
    return _part(group, given)


def _part(group: type[T], given: Mapping[str, Any]) -> T:
    _check(group, given)
    return group(**{name: given[name] for name in _names(group) if name in given})


def _check(group: Any, given: Mapping[str, Any]) -> None:
    for field in fields(group):
        if field.name not in given or field.type not in _TYPES:
            continue
        value, (wanted, words) = given[field.name], _TYPES[str(field.type)]
        fits = isinstance(value, wanted) and isinstance(value, bool) == (wanted is bool)
        if wanted is Integral:
            least = 0 if field.name in _MAY_BE_ZERO else 1
            fits, words = fits and value >= least, f"{words} >= {least}"
        if not fits:
            raise UserError(f"the model option {field.name} is {value!r}", f"it must be {words}")


def _names(group: Any) -> list[str]:
    return [field.name for field in fields(group)]


def _refuse_unknown(given: Mapping[str, Any], known: Collection[str], owner: str) -> None:
    for name in given:
        if name not in known:
            raise UserError(f"{owner} has no option {name!r}{did_you_mean(name, known)}")
