"""Flags of hustvl/Vim's main.py that are no settings here: accepted because they ask for what is always so, or refused
with a sentence that says what to use instead. The others are fields of :mod:`vimfast.config`."""

from __future__ import annotations

import argparse
from typing import Any

from vimfast.errors import UserError

TORCHRUN = "torchrun gives each process its place; start with torchrun --nproc_per_node=8 -m vimfast.train"

ACCEPTED = {
    "dist_eval": "evaluation is always spread over the processes, and each image is counted once",
    "pin_mem": "batches are decoded on the device, or copied from pinned memory",
    "no_pin_mem": "batches are decoded on the device, or copied from pinned memory",
    "train_mode": "a model is always trained in training mode",
    "no_nan2num": "a loss is never altered",
    "if_continue_inf": "steps with non-finite gradients are always skipped, up to --skip-limit in a row",
    "distributed": "torchrun says whether a run is distributed",
}
REFUSED = {
    "if_nan2num": "it hides divergence; drop it: steps with non-finite gradients are skipped, up to --skip-limit",
    "no_continue_inf": "give --skip-limit 1 to stop where gradients are non-finite",
    "no_train_mode": "give --drop 0 --drop-path 0 to train without dropout and stochastic depth",
    "resplit": "there are no augmentation splits to tell apart; drop it",
    "patience_epochs": "it belongs to --sched plateau, which follows past accuracies; give --sched cosine or step",
    "inat_category": "give a --data-path whose folders under train/ and val/ are the classes that you mean",
    "world_size": TORCHRUN,
    "dist_url": TORCHRUN,
    "local_rank": TORCHRUN,
}
# Settings that have another name in timm's train.py, or in other trainers.
TIMM = {
    "data_dir": "data_path",
    "img_size": "input_size",
    "workers": "num_workers",
    "validation_batch_size": "eval_batch_size",
    "grad_accum_steps": "accum_steps",
    "grad_checkpointing": "use_checkpoint",
    "checkpoint_hist": "keep_checkpoints",
    "log_interval": "log_every",
    "output": "output_dir",
    "initial_checkpoint": "finetune",
    "learning_rate": "lr",
}
DATA_SETS = "give a --data-path with train/<class>/ and val/<class>/; any set of images in that layout will do"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Teach a parser these flags, in both spellings. None of them sets anything."""
    for name in ACCEPTED:
        parser.add_argument(*_spellings(name), nargs=0, action=_Accept, help=argparse.SUPPRESS)
    for name, sentence in REFUSED.items():
        parser.add_argument(*_spellings(name), nargs="?", action=_Refuse, const=sentence, help=argparse.SUPPRESS)
    parser.add_argument(*_spellings("data_set"), action=_DataSet, help=argparse.SUPPRESS)


def _spellings(name: str) -> list[str]:
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


class _Accept(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        pass


class _Refuse(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        raise UserError(f"{option_string} is not taken: {self.const}")


class _DataSet(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        if values != "IMNET":
            raise UserError(f"{option_string} {values} is not taken: {DATA_SETS}")
