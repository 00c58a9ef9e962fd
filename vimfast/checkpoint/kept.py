"""The checkpoints of a run folder: ``checkpoint.pth``, before it ``checkpoint.1.pth`` and so on, and the best one."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from vimfast.checkpoint.files import HUB_WEIGHTS, DamagedCheckpoint, load_checkpoint, save_checkpoint
from vimfast.errors import UserError
from vimfast.files import TEMPORARY

CHECKPOINT = "checkpoint.pth"
BEST = "best_checkpoint.pth"
ASIDE = "checkpoint.aside.pth"  # what a run that resumed from an earlier one found in its place

_EARLIER = re.compile(r"checkpoint\.([1-9]\d*)\.pth")


def earlier_name(age: int) -> str:
    """The file of the checkpoint that is so many before the last."""
    return f"checkpoint.{age}.pth" if age else CHECKPOINT


def find_checkpoint(path: Path, *, best: bool) -> Path:
    """The file that a path means: itself, or of a run folder the last checkpoint, or the best one if there is one.

    Raises:
        UserError: a folder that is neither a run's nor in the hub's layout.
    """
    if not path.is_dir() or (path / HUB_WEIGHTS).exists():
        return path
    found = [path / BEST] if best and (path / BEST).exists() else kept_checkpoints(path)
    if not found:
        raise UserError(f"{path} is a folder without a checkpoint", "give a run folder, or the path of a checkpoint")
    return found[0]


def kept_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints in a run folder, the last first."""
    ages = {int(match[1]) for path in folder.glob("checkpoint.*.pth") if (match := _EARLIER.fullmatch(path.name))}
    return [path for age in sorted({0, *ages}) if (path := folder / earlier_name(age)).exists()]


class Loaded(NamedTuple):
    """A checkpoint that was looked for."""

    path: Path
    state: dict[str, Any]
    notes: list[str]  # a sentence for each one that was passed over because it is damaged


def load_found(path: Path, *, best: bool) -> Loaded:
    """The checkpoint that a path means, as :func:`find_checkpoint` has it; of a folder, the first that is not damaged.

    Raises:
        UserError: there is none, or one that cannot be read.
    """
    first = find_checkpoint(path, best=best)
    if first == path:
        state = load_checkpoint(path)
        return Loaded(path, state, _about_others(path, state))
    return _first_sound([first, *(other for other in kept_checkpoints(path) if other != first)], "use another one")


def _about_others(path: Path, state: dict[str, Any]) -> list[str]:
    """A line about weights that are not the model's."""
    match state.get("beside"):
        case [str(name), *more]:
            also = f" and {len(more)} more" if more else ""
            return [f"{path} holds weights beside the model's, which are left out: {name}{also}"]
    return []


def load_last(folder: Path) -> Loaded | None:
    """The last checkpoint of a run folder whose bytes are as they were written; None if the folder has none.

    Raises:
        UserError: all are damaged, or one is no checkpoint of a kind that can be read.
    """
    kept = kept_checkpoints(folder)
    return _first_sound(kept, "begin again in another --output_dir") if kept else None


def _first_sound(paths: Sequence[Path], fix: str) -> Loaded:
    damaged: list[DamagedCheckpoint] = []
    for path in paths:
        try:
            return Loaded(path, load_checkpoint(path), [f"{error.problem}; taking {path} instead" for error in damaged])
        except DamagedCheckpoint as error:  # noqa: PERF203
            damaged.append(error)
    raise DamagedCheckpoint("; ".join(error.problem for error in damaged), fix)


def save_last(folder: Path, state: dict[str, Any], count: int) -> None:
    """Write `state` as the last checkpoint and keep `count` of them, itself included.

    Those before it move on once the new one is on the disk. At any moment the last one is a whole file.
    """
    save_checkpoint(folder / CHECKPOINT, state, before=lambda: _move_on(folder, count))


def set_aside(folder: Path, origin: Path) -> list[Path]:
    """Get the checkpoints after `origin`, from which a run resumes, out of the way, so that it is the last one.

    Returns:
        those that were moved, each to :data:`ASIDE`; nothing where `origin` is the last, or not of this folder.
    """
    kept = kept_checkpoints(folder)
    if not (folder / CHECKPOINT).exists() or origin.resolve() not in [path.resolve() for path in kept]:
        return []
    after = kept[: [path.resolve() for path in kept].index(origin.resolve())]
    for path in reversed(after):  # so that what stays is the very last
        os.replace(path, folder / ASIDE)
    return after


def _move_on(folder: Path, count: int) -> None:
    for age in range(count - 1, 1, -1):
        with suppress(FileNotFoundError):
            os.replace(folder / earlier_name(age - 1), folder / earlier_name(age))
    last, before = folder / CHECKPOINT, folder / earlier_name(1)
    if count < 2 or not last.exists():
        return
    link = before.with_name(before.name + TEMPORARY)
    try:
        link.unlink(missing_ok=True)
        os.link(last, link)
        os.replace(link, before)
    except OSError:  # a file system without links: for a moment the one before is the only one
        os.replace(last, before)
    finally:
        link.unlink(missing_ok=True)  # it is still there where both were the same file already
