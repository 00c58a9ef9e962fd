"""The named models, registered with timm: one table, no factory twice."""

from __future__ import annotations

import difflib
import re
from typing import Any

import timm
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, get_pretrained_cfg, register_model
from torch import Tensor, nn

from vimfast.errors import UserError
from vimfast.models.options import check_values
from vimfast.models.vision_mamba import VisionMamba

WIDTHS = {"tiny": 192, "small": 384, "base": 768}
GRIDS = {"patch16_224": (224, 16), "patch16_stride8_224": (224, 8), "patch16_384": (384, 16)}  # img_size, stride


def _table() -> dict[str, tuple[int, int, int]]:
    """(embed_dim, img_size, stride) of every name, the short ones and those of hustvl/Vim."""
    table = {}
    for size, width in WIDTHS.items():
        token = "middle_cls_token" if size == "base" else "midclstok"
        for grid, layout in GRIDS.items():
            for tail in ("", f"_bimambav2_final_pool_mean_abs_pos_embed_with_{token}_div2"):
                table[f"vim_{size}_{grid}{tail}"] = (width, *layout)
    return table


MODELS = _table()

default_cfgs = generate_default_cfgs(
    {
        name: {
            "input_size": (3, img_size, img_size),
            "fixed_input_size": True,
            "mean": IMAGENET_DEFAULT_MEAN,
            "std": IMAGENET_DEFAULT_STD,
            "crop_pct": 0.875,
            "interpolation": "bicubic",
            "num_classes": 1000,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        }
        for name, (_, img_size, _) in MODELS.items()
    }
)


# Options that runs give to every model, with values that are checked elsewhere.
_USUAL = {"num_classes", "img_size", "drop_rate", "drop_path_rate", "scan_backend", "dynamic_img_size", "pretrained"}

# What belongs to a run and not to the weights.
RUN_OPTIONS = ("drop_rate", "drop_path_rate", "scan_backend", "dynamic_img_size", "device", "dtype")


def _vision_mamba(in_chans: int = 3, **kwargs: Any) -> VisionMamba:
    """VisionMamba under timm's name for its channels; it remembers how to build another one for its weights."""
    model = VisionMamba(channels=in_chans, **kwargs)
    model.model_args = {k: v for k, v in kwargs.items() if k not in RUN_OPTIONS} | {"in_chans": in_chans}
    return model


def _fitted(state: dict[str, Tensor], model: VisionMamba) -> dict[str, Tensor]:
    """Published weights, which are of the images that their configuration says."""
    cfg: Any = model.pretrained_cfg
    return model.fit_pos_embed(state, img_size=tuple(cfg["input_size"][1:]))


def _register(name: str, embed_dim: int, stride: int) -> None:
    def build(pretrained: bool = False, **kwargs: Any) -> VisionMamba:
        if "channels" in kwargs:
            kwargs["in_chans"] = kwargs.pop("channels")
        check_values(kwargs)
        if kwargs.get("depth") == 0:
            raise UserError("the model option depth is 0", "a named model has at least 1 block")
        maps = kwargs.get("depth", 24) // (2 if kwargs.get("if_bidirectional") else 1)
        quarters = tuple(dict.fromkeys(max(maps * i // 4 - 1, 0) for i in (1, 2, 3, 4)))
        return build_model_with_cfg(
            _vision_mamba,
            name,
            pretrained,
            pretrained_filter_fn=_fitted,
            feature_cfg={"out_indices": kwargs.pop("out_indices", quarters), "feature_cls": "getter"},
            **{"embed_dim": embed_dim, "stride": stride, "final_pool_type": "mean", **kwargs},
        )

    build.__name__ = build.__qualname__ = name
    build.__module__ = __name__
    globals()[name] = register_model(build)  # timm lists the name in __all__


for _name, (_embed_dim, _, _stride) in MODELS.items():
    _register(_name, _embed_dim, _stride)


def _close_names(name: str) -> list[str]:
    """Up to three. What begins as a Vision Mamba's name is one of those, however much of it is missing."""
    if name.lower().startswith("vim"):
        short = [f"vim_{size}_{grid}" for size in WIDTHS for grid in GRIDS]
        return sorted(short, key=lambda own: -difflib.SequenceMatcher(None, own, name.lower()).ratio())[:3]
    return difflib.get_close_matches(name, timm.list_models(), n=3)


def create_model(
    name: str,
    *,
    img_size: int | tuple[int, int] | None = None,
    dynamic_img_size: bool = False,
    scan_backend: str = "auto",
    **kwargs: Any,
) -> nn.Module:
    """A model of timm's registry, those of this package included, freshly initialized.

    Args:
        name: ``vim_tiny_patch16_224`` and so on, or any timm model.
        img_size: side of the images in pixels, or (height, width); None for the named one. Handed to a model built for
            one size only.
        dynamic_img_size: images may be of other sizes too. Handed to a model built for one size only.
        scan_backend: of a Vision Mamba's scan, see :mod:`vimfast_kernels.backends`; other models have none.
        kwargs: constructor options, those of :mod:`vimfast.models.options` for a Vision Mamba.

    Raises:
        UserError: the name or an option does not exist (with the closest ones), or a value is invalid.
    """
    ours = name in MODELS
    if not timm.is_model(name):
        close = _close_names(name)
        fix = f"did you mean {' or '.join(map(repr, close))}?" if close else "timm.list_models() has the names"
        raise UserError(f"there is no model named {name!r}", fix)
    if ours:
        kwargs["scan_backend"] = scan_backend
    elif scan_backend != "auto":
        raise UserError(f"{name} has no selective scan for the scan backend {scan_backend!r}", "leave that option out")
    cfg = get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        kwargs |= {"img_size": img_size, **({"dynamic_img_size": True} if dynamic_img_size else {})}
    try:
        return timm.create_model(name, **kwargs)
    except (TypeError, ValueError, AssertionError, IndexError, ZeroDivisionError, RuntimeError) as error:
        if unknown := re.search(r"unexpected keyword argument '(\w+)'", str(error)):
            raise UserError(f"{name} has no option {unknown[1]!r}") from None
        if "No pretrained weights" in str(error):
            raise UserError(
                f"there are no published weights of {name} to download", "give a checkpoint instead"
            ) from None
        if not isinstance(error, AssertionError | ValueError) and not kwargs.keys() - _USUAL:
            raise  # no value of the user's explains it
        # Such as heads that do not divide the width.
        why = " ".join(str(error).split()) or "its own check failed"
        raise UserError(f"{name} cannot be built with these options ({why})", "change --model-kwargs") from error
