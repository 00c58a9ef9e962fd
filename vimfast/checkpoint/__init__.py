"""Checkpoints: files, weights that fit or are made to, and those of hustvl/Vim."""

from vimfast.checkpoint.background import Background, copied
from vimfast.checkpoint.description import Description, described
from vimfast.checkpoint.files import HUB_WEIGHTS, DamagedCheckpoint, load_checkpoint, save_checkpoint, weights_held
from vimfast.checkpoint.fitting import OtherModel, head_names, load_for_finetuning, load_weights
from vimfast.checkpoint.hustvl import load_optimizer
from vimfast.checkpoint.kept import (
    ASIDE,
    BEST,
    CHECKPOINT,
    Loaded,
    find_checkpoint,
    kept_checkpoints,
    load_found,
    load_last,
    save_last,
    set_aside,
)

__all__ = [
    "ASIDE",
    "BEST",
    "CHECKPOINT",
    "HUB_WEIGHTS",
    "Background",
    "DamagedCheckpoint",
    "Description",
    "Loaded",
    "OtherModel",
    "copied",
    "described",
    "find_checkpoint",
    "head_names",
    "kept_checkpoints",
    "load_checkpoint",
    "load_for_finetuning",
    "load_found",
    "load_last",
    "load_optimizer",
    "load_weights",
    "save_checkpoint",
    "save_last",
    "set_aside",
    "weights_held",
]
