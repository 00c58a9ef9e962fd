"""The folder that a run writes to: held by one run at a time, with the settings of each."""

from __future__ import annotations

import fcntl
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

import yaml

from vimfast.config import Config
from vimfast.errors import UserError, remedy

RESOLVED_CONFIG = "config.yaml"
LOCK = ".lock"


class RunFolder:
    """A run folder, made if it is missing, and locked by rank 0; the system frees the lock however its process ends.

    Raises:
        UserError: it cannot be written to, or another run writes to it.
    """

    def __init__(self, path: Path, *, is_main: bool) -> None:
        self.path = path
        self._is_main = is_main
        self._lock: TextIO | None = None
        if is_main:
            try:
                path.mkdir(parents=True, exist_ok=True)
                self._hold()
            except OSError as error:
                self.release()
                raise unwritable(path, error) from None

    def _hold(self) -> None:
        self._lock = lock = open(self.path / LOCK, "a+", errors="replace")  # noqa: SIM115  # it says who holds it: not to be cut yet
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip()
            self.release()
            raise UserError(
                f"another run{holder and f', {holder},'} writes to {self.path}",
                "wait for it, or choose another --output_dir",
            ) from None
        except OSError:
            pass  # a file system without locks
        lock.seek(0)
        lock.truncate()
        lock.write(f"process {os.getpid()} of {socket.gethostname()}\n")
        lock.flush()

    def is_ours(self) -> bool:
        """Whether the folder of this name is still the one that was locked: it may be another run's by now."""
        try:
            return self._lock is not None and os.path.samestat(os.fstat(self._lock.fileno()), os.stat(self.path / LOCK))
        except (OSError, ValueError):  # removed, or released meanwhile
            return False

    def keep(self) -> bool:
        """Before something is written: make the folder again if it was removed or moved away meanwhile.

        Returns:
            whether that was so.

        Raises:
            UserError: another run writes to what has this name now, or it cannot be made again.
        """
        if not self._is_main or self.is_ours():
            return False
        is_there = self.path.is_dir()
        self.release()
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._hold()
        except OSError as error:
            raise unwritable(self.path, error) from None
        return not is_there

    def release(self) -> None:
        """Let another run write to it."""
        if self._lock is not None:
            lock, self._lock = self._lock, None
            with suppress(OSError):  # what is not written yet cannot be
                lock.close()

    def save_config(self, config: Config) -> None:
        """Write the resolved settings; different ones of an earlier run are kept as ``config.1.yaml`` and so on.

        Raises:
            UserError: they cannot be written.
        """
        if not self._is_main:
            return
        path = self.path / RESOLVED_CONFIG
        try:
            if path.exists() and _settings(path) != _as_read(config):
                number = 1
                while (kept := self.path / f"config.{number}.yaml").exists():
                    number += 1
                os.replace(path, kept)
            config.save(path)
        except OSError as error:
            raise unwritable(self.path, error) from None


def check_folder(path: Path) -> None:
    """Whether a run folder can be made at this path, or is there; permissions and the disk are not looked at.

    Raises:
        UserError: a file is in the way, or TensorBoard cannot write to a folder of this name.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        name = str(path).encode(errors="backslashreplace").decode()
        raise UserError(
            f"--output_dir {name} is not UTF-8, and TensorBoard writes to no such folder", "choose another name"
        ) from None
    for part in (path, *path.parents):
        if part.is_file():
            where = "" if part == path else f": {part}"
            raise UserError(f"--output_dir {path}{where} is a file", "give a folder, which is made if it is missing")


def unwritable(folder: Path, error: OSError) -> UserError:
    """Why a run folder cannot be written to, in a sentence."""
    return UserError(
        f"--output_dir {folder} cannot be written to ({error.strerror})", remedy(error, "choose another folder")
    )


def _settings(path: Path) -> Any:
    try:
        return _but_for_resume(yaml.safe_load(path.read_text()))
    except (yaml.YAMLError, UnicodeDecodeError):
        return None


def _as_read(config: Config) -> Any:
    return _but_for_resume(yaml.safe_load(yaml.safe_dump(config.to_dict())))


def _but_for_resume(settings: Any) -> Any:
    """Where a run was resumed is in its log; its settings are the same."""
    if isinstance(settings, dict) and isinstance(settings.get("run"), dict):
        settings["run"].pop("resume", None)
    return settings
