"""``vimfast.train`` with a pause behind each training batch, so that a test can signal it in mid-epoch on any machine.

The environment's PAUSE tells how many seconds. The pause changes no bit of the run.
"""

from __future__ import annotations

import os
import time

from torch import Tensor

from vimfast import train
from vimfast.cli import run_main
from vimfast.trainer import Trainer

_train_batch = Trainer._train_batch


def paced(self: Trainer, *args: Tensor | int) -> None:
    _train_batch(self, *args)  # type: ignore[arg-type]
    time.sleep(float(os.environ["PAUSE"]))


if __name__ == "__main__":
    Trainer._train_batch = paced  # type: ignore[method-assign]
    run_main(train.main)
