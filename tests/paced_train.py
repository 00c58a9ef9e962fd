"""``python -m vimfast.train`` with a pause before each batch, so that a test can act in mid-epoch on any machine.

Set in the environment: ``PAUSE``, in seconds, and ``FAULT="rank:step:deed"`` (or ``all:step:deed``), which makes that
rank do a deed of `Paced.do` in that step. ``HOLD="epoch/step file"`` has all ranks wait there until the file exists.
Each rank prints its process id, the launcher's attempt and its place before it pauses. The pause does not change a bit
of the run. ``FORKS=N`` runs N ranks as ``vimfast train`` does, with ``RESTARTS=N``.
"""

from __future__ import annotations

import os
import time

import torch

from vimfast.cli import end_process, run_main
from vimfast.errors import UserError
from vimfast.processes.launch import launch
from vimfast.train.__main__ import main
from vimfast.train.loop import Hook, Place, TrainingRun


class Paced(Hook):
    def __init__(self, run: TrainingRun) -> None:
        self.run, self.rank = run, run.world.rank
        self.sound = run.train_step.criterion

    def before_step(self, place: Place) -> None:
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)
        line = f"rank {self.rank} pid {os.getpid()} attempt {attempt} step {place.epoch}/{place.step}"
        print(f"{line}\n", end="", flush=True)  # in one write, so that the lines of two ranks never run together
        time.sleep(float(os.environ.get("PAUSE", "1")))
        held_at, _, until = os.environ.get("HOLD", "").partition(" ")
        while held_at == f"{place.epoch}/{place.step}" and not os.path.exists(until):
            time.sleep(0.05)
        if fault := os.environ.get("FAULT"):
            rank, step, deed = fault.split(":")
            if int(step) == place.step and rank in (str(self.rank), "all"):
                self.do(deed)

    def returned(self, place: Place) -> None:
        self.run.train_step.criterion = self.sound
        del os.environ["FAULT"]

    def do(self, deed: str) -> None:
        if deed == "nan":  # from here on, until it is rolled back
            self.run.train_step.criterion = lambda *inputs: float("nan") * self.sound(*inputs)
        else:
            do(deed)


def do(deed: str) -> None:
    if deed == "memory":
        raise torch.OutOfMemoryError
    if deed == "user":
        raise UserError("the image is upside down; turn it")
    if deed == "crash":
        raise ValueError("a bug of ours")
    if deed == "stuck":
        time.sleep(3600)


def rank() -> None:
    run_main(lambda: main(lambda run: [Paced(run)]), end_process)


if __name__ == "__main__":
    if "FORKS" in os.environ:
        end_process(launch(rank, int(os.environ["FORKS"]), restarts=int(os.environ.get("RESTARTS", 0))))
    rank()
