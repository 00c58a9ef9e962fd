"""Where a run's figures are shown, beside its own files: TensorBoard, and Weights & Biases."""

from __future__ import annotations

import errno
import os
import uuid
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from vimfast.config import RunConfig
from vimfast.errors import UserError
from vimfast.files import read_file, write_text

_PROJECT = "vimfast"  # unless WANDB_PROJECT says another
_ID = "run-id"  # the file of it, in the run folder's wandb/


class Board(Protocol):
    """Takes figures as they come."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Show figures, under names such as ``train/loss`` (`step` is the run's) or ``epoch/test_acc1`` (an epoch).

        Raises:
            OSError: they cannot be written.
        """

    def close(self) -> None:
        """Finish; no more figures follow.

        Raises:
            OSError: they cannot be written.
        """


class TensorBoard:
    """Event files in ``tensorboard/``."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter  # here, for it takes a second

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


def check_boards(run: RunConfig) -> None:
    """Whether the run has a folder, and this machine the packages, for what the settings ask for.

    Raises:
        UserError: one is missing.
    """
    for flag, wanted in (("--csv", run.csv), ("--wandb", run.wandb)):
        if wanted and not run.output_dir:
            raise UserError(f"{flag} writes to the run folder, and there is no --output_dir", "add one")
    if run.wandb and find_spec("wandb") is None:
        raise UserError("--wandb needs the package wandb, which is not installed", "pip install wandb, or drop --wandb")


class WandB:
    """A run of Weights & Biases, which a resumed run continues. Its environment variables say the rest: WANDB_MODE
    (``offline`` sends nothing), WANDB_PROJECT, WANDB_NAME.

    Args:
        folder: of the run; files are written to ``wandb/`` in it.
        settings: of the run, as :meth:`~vimfast.config.Config.to_dict` has them.
        resumed: whether the run continues the one of this folder.

    Raises:
        UserError: it cannot begin, for instance as nobody is logged in.
    """

    def __init__(self, folder: Path, settings: dict[str, Any], *, resumed: bool) -> None:
        import wandb  # here, for it takes seconds

        self._error: type[Exception] = wandb.Error
        own = folder / "wandb"
        own.mkdir(exist_ok=True)
        try:
            self._run: Any = wandb.init(
                dir=str(folder),
                project=os.environ.get("WANDB_PROJECT", _PROJECT),
                name=os.environ.get("WANDB_NAME", folder.resolve().name),
                id=_run_id(own / _ID, resumed),
                resume="allow",
                config=settings,
                settings=wandb.Settings(console="off"),  # train.log has all lines, and bars are not for logs
            )
        except wandb.Error as error:
            raise UserError(
                f"--wandb cannot begin ({error})", "run wandb login, or set WANDB_MODE=offline and sync later"
            ) from None
        # A run that is rolled back comes to a step again, which W&B's own count of steps does not allow.
        self._run.define_metric("train/*", step_metric="step")
        self._run.define_metric("epoch/*", step_metric="epoch")

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        axis = "epoch" if all(name.startswith("epoch/") for name in values) else "step"
        try:
            self._run.log({**values, axis: step})
        except self._error as error:
            raise OSError(errno.EIO, str(error)) from None

    def close(self) -> None:
        try:
            self._run.finish()
        except self._error as error:
            raise OSError(errno.EIO, str(error)) from None


def _run_id(path: Path, resumed: bool) -> str:
    """The one that the run of this folder has had, or a new one."""
    try:
        known = read_file(path, most=64).decode().strip() if resumed else ""
    except (FileNotFoundError, ValueError):
        known = ""
    if not known.isalnum():
        known = uuid.uuid4().hex[:12]
        write_text(path, f"{known}\n")
    return known
