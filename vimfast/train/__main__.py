"""``python -m vimfast.train``: train or evaluate, alone or under torchrun."""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from vimfast.cli import end_process, run_main
from vimfast.errors import UserError
from vimfast.processes.starting import Starting

if TYPE_CHECKING:
    from vimfast.config import Config
    from vimfast.data.views import Stages
    from vimfast.train.build import Hooks


def main(hooks: Hooks | None = None, stage: Stages | None = None) -> int:
    """Train or evaluate by the flags of the command line; returns the exit status.

    Args:
        hooks: makes hooks of the caller's for a run (:class:`vimfast.train.loop.Hook`).
        stage: input size and augmentation of each epoch (:class:`vimfast.data.views.Stage`), instead of the settings'.
    """
    with Starting() as starting:  # before all that takes time
        return _run(starting, hooks, stage)


def settings(words: list[str]) -> Config:
    """Of these flags.

    Raises:
        UserError: a flag or a value is wrong, or there is no data.
    """
    from vimfast.config import load_config

    cfg = load_config(words)
    if not cfg.data.data_path:
        raise UserError("--data-path is missing", "give the folder of shards, or of train/ and val/")
    return cfg


def _run(starting: Starting, hooks: Hooks | None, stage: Stages | None) -> int:
    cfg = settings(sys.argv[1:])
    # After the flags, so that --help and a misspelt one answer at once. Looking for garbage among the modules again and
    # again takes a fifth of the imports' time.
    gc.disable()
    folder = Path(cfg.run.output_dir) if cfg.run.output_dir and not cfg.run.eval else None
    threading.Thread(target=_import_all, args=(folder is not None,), daemon=True).start()
    from vimfast.dist import processes
    from vimfast.processes.control import Control
    from vimfast.processes.hub import START
    from vimfast.train.start_up import StartUp

    run, start_up = cfg.run, StartUp()
    # What is started first ends last: CUDA graphs and loaders, then the control, then the process group, whose end
    # waits for graphs that use it. On an error the control ends all processes, and nothing is waited for.
    with (
        processes(run.device, timeout=max(run.stall_timeout, START) + 120) as world,  # the control's sentence first
        Control(world, run.stall_timeout, folder, starting) as control,
    ):
        start_up.done("process group")
        try:
            from vimfast.train.build import build
        except ImportError:  # where the thread's attempt failed while this one waited for it, which hides why
            from vimfast.train.build import build

        gc.freeze()
        gc.enable()
        start_up.done("imports")
        with build(cfg, world, control, start_up, hooks, stage) as training:
            if cfg.run.dry_run:
                done = "evaluated" if run.eval else "trained, and nothing written"
                training.report.say(f"nothing was {done} (--dry-run)")
            else:
                training.run()
    return control.status


@contextmanager
def without_wandb() -> Iterator[None]:
    """In the block, timm does not import wandb, as it does wherever that is installed: a good part of a second, for
    something that only a run with ``--wandb`` uses, which imports it itself."""
    if "wandb" in sys.modules:
        yield
        return
    sys.modules["wandb"] = None  # type: ignore[assignment]  # to Python, a module that is not installed
    try:
        yield
    finally:
        del sys.modules["wandb"]


def _import_all(logs: bool) -> None:
    """Import in the background what takes seconds, while the main thread waits for the GPU and the other processes."""
    with suppress(Exception):  # the main thread meets it again
        from vimfast.data.decoding import import_dali

        with without_wandb():
            from vimfast.train import build  # noqa: F401
        import_dali()
        if logs:
            import torch.utils.tensorboard  # noqa: F401


if __name__ == "__main__":
    run_main(main, end_process)
