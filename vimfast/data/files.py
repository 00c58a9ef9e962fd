"""Images anywhere on the disk as a source, read as those of a folder tree are. They have no classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from vimfast.data.source import BadImage, FolderSource, Images
from vimfast.errors import UserError
from vimfast.shards.tree import FileList


@dataclass(frozen=True)
class _Listed(FileList):
    paths: Sequence[Path] = ()

    def name(self, i: int) -> str:
        return str(self.paths[i])

    def path(self, i: int) -> Path:
        return self.paths[i]


class FilesSource(FolderSource):
    """The images at these paths, all labelled 0. One that cannot be read for whatever reason is a bad image."""

    def __init__(self, paths: Sequence[Path]) -> None:
        nothing = np.zeros(0, np.uint8), np.zeros(1, np.int64)
        super().__init__(_Listed(Path(), [""], np.zeros(len(paths), np.int32), *nothing, paths=paths))

    def read(self, ids: np.ndarray) -> Images:
        try:
            return super().read(ids)
        except BadImage:
            raise
        except UserError:
            for bad in self._unreadable(ids):
                raise bad from None
            raise

    def _unreadable(self, ids: np.ndarray) -> Iterator[BadImage]:
        """Those that are not to be had even one by one."""
        for i in ids.tolist():
            try:
                super().read(np.array([i]))
            except UserError as error:  # noqa: PERF203
                yield BadImage(i, error.problem)
