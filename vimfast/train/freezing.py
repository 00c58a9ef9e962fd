"""Which weights are trained: all, the mixers, or what lies after the first blocks."""

from __future__ import annotations

import re

from timm.models import group_parameters
from torch import nn

from vimfast.checkpoint import head_names
from vimfast.config import FinetuneConfig
from vimfast.errors import UserError

MIXING = re.compile(r"\.(mixer|attn)\.")  # a Vision Mamba's blocks have the one, a transformer's the other


def freeze(model: nn.Module, cfg: FinetuneConfig) -> str:
    """Take what the settings freeze out of training; to be called before the optimizer sees the model.

    ``attn_only`` trains the mixers, the head and the position embedding. ``freeze_layers`` = n keeps the embedding and
    the first n blocks, in the order in which timm numbers the model's layers.

    Returns:
        a line that says how much is trained; empty if all is.

    Raises:
        UserError: the model has no such parts, or not so many.
    """
    names = [name for name, _ in model.named_parameters()]
    trained = set(names)
    if cfg.attn_only:
        if not any(MIXING.search(name) for name in names):
            raise UserError("--attn-only trains mixers or attention, and this model has neither", "use --freeze-layers")
        head = {name for name in names if _is_of_head(model, name)}
        trained &= head | {name for name in names if MIXING.search(name) or name == "pos_embed"}
    if cfg.freeze_layers:
        trained -= _first_layers(model, cfg.freeze_layers)
    if len(trained) == len(names):
        return ""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    total = sum(p.numel() for p in model.parameters())
    moving = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return f"{moving:,} of {total:,} parameters are trained, the others stay as they are"


def _first_layers(model: nn.Module, count: int) -> set[str]:
    matcher = getattr(model, "group_matcher", None)
    if matcher is None:
        raise UserError(
            "--freeze-layers needs a model with timm's group_matcher, which this one does not have", "drop it"
        )
    layers = group_parameters(model, matcher(coarse=False))  # number -> names: the embedding, each block, norm, head
    ordered = [layers[number] for number in sorted(layers)]
    after = {i for i, names in enumerate(ordered) if any(_is_of_head(model, name) for name in names)}
    blocks = min(after, default=len(ordered)) - 1
    if count > blocks:
        raise UserError(f"--freeze-layers is {count} and the model has {blocks} layers before its head", "give no more")
    return {name for names in ordered[: count + 1] for name in names}


def _is_of_head(model: nn.Module, name: str) -> bool:
    return name.rpartition(".")[0] in head_names(model)
