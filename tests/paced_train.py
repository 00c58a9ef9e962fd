"""``python -m vimfast.train`` with a pause before each batch, so that a test can act in mid-epoch on any machine.

Set in the environment: ``PAUSE``, in seconds, and ``FAULT="rank:step:deed"`` (or ``all:step:deed``), which makes that
rank do a deed of `do` in that step. Each rank prints its process id, torchrun's attempt and its place before it pauses.
The pause does not change a bit of the run.
"""

from __future__ import annotations

import os
import time
from typing import Any

import torch

from vimfast.cli import end_process, run_main
from vimfast.errors import UserError
from vimfast.train import main
from vimfast.trainer import Trainer

_train_batch = Trainer._train_batch


def paced_train_batch(self: Trainer, *args: Any) -> None:
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
    place = f"rank {self.world.rank} pid {os.getpid()} attempt {attempt} step {self.epoch}/{self.step}"
    print(f"{place}\n", end="", flush=True)  # in one write, so that the lines of two ranks never run together
    time.sleep(float(os.environ.get("PAUSE", "1")))
    if fault := os.environ.get("FAULT"):
        rank, step, deed = fault.split(":")
        if int(step) == self.step and rank in (str(self.world.rank), "all"):
            do(deed)
    _train_batch(self, *args)


def do(deed: str) -> None:
    if deed == "memory":
        raise torch.OutOfMemoryError
    if deed == "user":
        raise UserError("the image is upside down; turn it")
    if deed == "crash":
        raise ValueError("a bug of ours")
    if deed == "stuck":
        time.sleep(3600)


if __name__ == "__main__":
    Trainer._train_batch = paced_train_batch  # type: ignore[method-assign]
    run_main(main, end_process)
