"""The one exception for what a user can fix."""

from __future__ import annotations

import difflib
import errno
import re
import sys
import traceback
from collections.abc import Iterable
from importlib.metadata import packages_distributions

_OWN = ("vimfast", "vimfast_kernels")
_REMEDIES = {
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "make room there"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "fix its permissions"),
    errno.EROFS: "mount it writable",
    errno.EIO: "check the disk",
}
_LITTLE_MEMORY = ("out of memory", "ALLOC_FAILED", "cudaErrorMemoryAllocation", "can't allocate memory", "bad_alloc")


class UserError(Exception):
    """Bad input, in one sentence: ``<problem>; <fix>``.

    Attributes:
        problem: what is wrong, with the offending value.
        fix: what to do about it, or None where the problem says it all.
    """

    def __init__(self, problem: str, fix: str | None = None) -> None:
        super().__init__(problem, fix)  # both, so that the error survives the way out of a worker process
        self.problem, self.fix = problem, fix

    def __str__(self) -> str:
        link = " " if self.problem.endswith("?") else "; "  # after "did you mean 'train'?"
        return one_line(self.problem if self.fix is None else f"{self.problem}{link}{self.fix}")


def remedy(error: OSError, otherwise: str = "") -> str:
    """What to do about a file or folder that cannot be made, written or read, by the system's error.

    Args:
        otherwise: what helps whatever the error is, such as another folder, and all that does under /proc.
    """
    return ", or ".join(filter(None, (_REMEDIES.get(error.errno or 0, ""), otherwise)))


def unusable_package(error: BaseException) -> UserError | None:
    """What to say where a package is not installed, or is installed and cannot be imported; None: the error is
    something else, such as a module of ours that is not there."""
    if isinstance(error, ImportError) and _top(error.name) in _OWN and error.__cause__ is not None:
        return unusable_package(error.__cause__)
    if isinstance(error, ModuleNotFoundError) and error.name is not None and _top(error.name) not in _OWN:
        return UserError(str(error), "vimfast doctor says what is missing and how to install it")
    module = _not_imported(error)
    return None if module is None else _broken(module, error)


def _broken(module: str, error: BaseException) -> UserError:
    package, found = _top(module), set(packages_distributions().get(_top(module), ()))
    if len(found) > 1:  # have modules in "nvidia", say, of which one is nvidia.dali
        package = ".".join(module.split(".")[:2])
        found = {name for name in found if name.replace("-", "").startswith(package.replace(".", ""))}
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    again = f"pip install --force-reinstall {min(found)}, or see" if found else "see"
    return UserError(
        f"{package} is installed and cannot be imported ({reason})", f"{again} what vimfast doctor says of it"
    )


def _top(module: str | None) -> str:
    return (module or "").partition(".")[0]


def _not_imported(error: BaseException) -> str | None:
    """The module of another package in whose import an error was raised, if it was."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    while own := [i for i, frame in enumerate(frames) if _top(frame.f_globals.get("__name__")) in _OWN]:
        frames = frames[own[-1] + 1 :]
    for frame in frames:
        name = str(frame.f_globals.get("__name__"))
        if frame.f_code.co_name == "<module>" and name != "__main__" and name not in sys.modules:
            return name
    if isinstance(error, ImportError) and _top(error.name) not in ("", *_OWN, *sys.stdlib_module_names):
        return error.name  # a name that is not in it, or its machine code
    return None


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that there was too little memory, on a GPU or on the host: torch has an exception for its
    own allocator alone, while CUDA, cuBLAS, Triton, DALI and torch on a CPU each have words of their own."""
    out = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return out or any(sign in str(error) for sign in _LITTLE_MEMORY)


def counted(number: int, what: str) -> str:
    """``1 image``, ``2,000 classes``: for nouns whose plural ends in s, of things or of a kind ("train image")."""
    ending = "es" if what.endswith(("s", "tch")) else "s"
    return f"{number:,} {what}{ending * (number != 1)}"


def in_bytes(count: int) -> str:
    """A size for a person: 146.2 GB."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:,.1f} {unit}"
    return f"{count} B"


def duration(seconds: float) -> str:
    """A time for a person, in hours, minutes and seconds: 0:01:05, 27:01:40."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def one_line(text: str) -> str:
    """With control characters spelled out: names of files may have line ends in them."""
    return re.sub(r"[\x00-\x1f\x7f]", lambda found: repr(found[0])[1:-1], text)


def printable(text: str) -> str:
    """On one line and valid Unicode, as names of files and classes need not be."""
    return one_line(text.encode("utf-8", "backslashreplace").decode())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A tail for an error sentence: ``"; did you mean 'lr'?"``, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
