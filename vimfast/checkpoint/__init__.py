"""Checkpoints: files, weights that fit or are made to, and those of hustvl/Vim."""

from vimfast.checkpoint.files import load_checkpoint, save_checkpoint, weights_held
from vimfast.checkpoint.fitting import head_names, load_for_finetuning, load_weights
from vimfast.checkpoint.hustvl import load_optimizer

__all__ = [
    "head_names",
    "load_checkpoint",
    "load_for_finetuning",
    "load_optimizer",
    "load_weights",
    "save_checkpoint",
    "weights_held",
]
