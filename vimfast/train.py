"""``python -m vimfast.train``: train or evaluate, alone or under torchrun."""

from __future__ import annotations

import sys
import time

from vimfast import dist
from vimfast.cli import run_main
from vimfast.config import load_config
from vimfast.errors import UserError


def main() -> None:
    cfg = load_config(sys.argv[1:])
    if not cfg.data.data_path:
        raise UserError("--data-path is missing; give the folder of shards, or of train/ and val/")
    from vimfast.trainer import Trainer  # behind the flags, so that --help and a misspelt one answer at once

    world = dist.start(cfg.run.device)
    try:
        trainer = Trainer(cfg, world)
        try:
            trainer.run()
        finally:
            trainer.close()
    except UserError:
        # What is wrong on every process is told by the first; torchrun ends the others while they wait here.
        time.sleep(0 if world.is_main else 3)
        raise
    finally:
        dist.stop()


if __name__ == "__main__":
    run_main(main)
