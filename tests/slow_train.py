"""``python -m vimfast.train`` with steps of a second and more: no test of signals depends on the pace of the machine.

It also does what a test asks for by the environment: ``FAULT="rank:step:deed"`` makes one rank do a deed in one step.
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

STEP_SECONDS = float(os.environ.get("STEP_SECONDS", "1"))
FAULT = os.environ.get("FAULT", "")
train_batch = Trainer._train_batch


def slow_train_batch(self: Trainer, *args: Any) -> None:
    # One write, so that two ranks' lines never run together.
    print(f"rank {self.world.rank} pid {os.getpid()} step {self.epoch}/{self.step}\n", end="", flush=True)
    time.sleep(STEP_SECONDS)
    if FAULT:
        rank, step, deed = FAULT.split(":")
        if int(step) == self.step and rank in (str(self.world.rank), "all"):
            do(deed)
    train_batch(self, *args)


def do(deed: str) -> None:
    if deed == "memory":
        raise torch.OutOfMemoryError
    if deed == "user":
        raise UserError("the picture is upside down; turn it")
    if deed == "crash":
        raise ValueError("a bug of ours")
    if deed == "stuck":
        time.sleep(3600)
    if deed == "exit":
        os._exit(9)
    if deed == "once" and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
        os.kill(os.getpid(), 9)


Trainer._train_batch = slow_train_batch  # type: ignore[method-assign]

if __name__ == "__main__":
    run_main(main, end_process)
