"""What a checkpoint may hold beside tensors: plain values, some of them in classes that other people's code saves."""

from __future__ import annotations

import argparse
import pickle
import re
from collections.abc import Callable
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np

_PLAIN = re.compile(r"[biuf][1248]|U\d{1,6}")


class PlainType:
    """Stands for numpy's dtype, which would take any state from the file; it knows numbers and text alone."""

    def __init__(self, code: str, *flags: bool) -> None:
        if not _PLAIN.fullmatch(code):  # in torch's words for a class that it does not let in
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r}) was not an allowed type of values")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, order, *_ = state
        if order in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(order)


def scalar(kind: PlainType, data: bytes) -> bool | int | float | str:
    """Stands for numpy's constructor of scalars: a best accuracy is often one."""
    value: bool | int | float | str = np.frombuffer(data, kind.dtype, count=1)[0].item()
    return value


# The classes that are let in, and by which names: of these modules in older and newer releases.
READABLE: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,  # the command line, in the original's files and timm's
    (PlainType, "numpy.dtype"),
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
    *((PurePosixPath, f"{module}.PosixPath") for module in ("pathlib", "pathlib._local")),
    *((PureWindowsPath, f"{module}.WindowsPath") for module in ("pathlib", "pathlib._local")),
]
