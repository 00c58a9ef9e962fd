"""``vimfast train``: train or evaluate, on one or several processes of this machine.

The flags are those of ``python -m vimfast.train``, and two that only concern the processes.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from typing import TYPE_CHECKING, Any

from vimfast.cli import Parser, end_process, run_main, whole
from vimfast.config.flags import flag_parser
from vimfast.errors import UserError
from vimfast.processes.launch import end_at_signals, launch

if TYPE_CHECKING:
    from vimfast.config import Config

_GPUS = "gpus"


def main() -> int:
    """Train as the command line says; returns the exit status."""
    end_at_signals()  # first of all: reading the settings takes its time on a busy machine
    own, sys.argv[1:] = _split(sys.argv[1:])
    from vimfast.train import __main__ as train

    cfg = train.settings(sys.argv[1:])  # before torch: a misspelled flag, or --help, answers at once
    if own.max_restarts and cfg.run.output_dir and cfg.run.resume != "auto" and not cfg.run.eval:
        raise UserError("a restart by --max-restarts would not continue the run", "add --resume auto")
    processes = _count(own.processes)
    if processes == 1 and not own.max_restarts:
        return train.main()
    # OpenMP reads it when torch is imported. torchrun sets the same.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    gc.disable()  # looking for garbage among the modules again and again takes a fifth of the imports' time
    with train.without_wandb():
        _import_shared(cfg)
    return launch(lambda: run_main(train.main, end_process), processes, restarts=own.max_restarts)


def _import_shared(cfg: Config) -> None:
    """What the processes share. On GPUs each imports the rest, which takes no longer than connecting to the others."""
    import torch
    import torch.distributed

    if cfg.run.device != "cpu" and torch.cuda.device_count():  # asks the driver without initializing CUDA
        return
    import vimfast.train.build  # noqa: F401

    if cfg.run.output_dir and not cfg.run.eval:
        import torch.utils.tensorboard


def parser() -> Parser:
    """Of the command line."""
    parser = flag_parser()
    _add_flags(parser.add_argument_group("processes of this machine"))
    return parser


def _split(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The flags about processes, and all others."""
    parser().parse_args(words)  # for --help, and so that these flags are suggested too
    own = Parser("vimfast train", "", add_help=False)
    _add_flags(own)
    return own.parse_known_args(words)


def _add_flags(parser: Any) -> None:
    text = f"training processes, one on each GPU; {_GPUS}: as many as there are GPUs [1]"
    parser.add_argument("--processes", metavar="N", default="1", help=text)
    text = "how often to start again after a crash; needs --resume auto to continue [0]"
    parser.add_argument("--max-restarts", metavar="N", type=whole(0), default=0, help=text)


def _count(text: str) -> int:
    if text == _GPUS:
        import torch

        count = torch.cuda.device_count()  # asks the driver without initializing CUDA, which no fork survives
        if count == 0:
            raise UserError(f"--processes is {_GPUS} but no GPU is visible", "check nvidia-smi, or give a number")
        return count
    if not text.isdecimal() or int(text) < 1:
        raise UserError(f"--processes is {text!r}", f"it must be an integer >= 1, or {_GPUS}")
    return int(text)
