"""What is printed: errors of several processes once per host, and long texts as far as they are read."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import select
import shutil
import socket
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from vimfast.errors import UserError, printable, remedy


def print_out(text: str) -> None:
    """Print what its reader, such as ``head``, may have enough of before its end."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        discard_output()


def discard_output() -> None:
    """Have nobody read what is left in stdout's buffer, which the interpreter writes when the program ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def is_output_read() -> bool:
    """Whether stdout is anything but a pipe or a socket whose reader has closed it."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return not any(events & select.POLLERR for _, events in poll.poll(0))


def output_error(error: BaseException) -> UserError | None:
    """What to say where stdout cannot be written, as on a full disk; nothing more is written to it. None: the error is
    another's."""
    if not isinstance(error, OSError) or error.filename is not None:
        return None
    try:
        sys.stdout.flush()  # what could not be written is still in its buffer,
        os.write(sys.stdout.fileno(), b"\n")  # unless it has none
    except OSError as refused:
        if refused.errno != error.errno:
            return None
        discard_output()
        return UserError(f"stdout cannot be written ({error.strerror})", remedy(error, "send it elsewhere"))
    return None


def fit_terminal(text: str, stream: TextIO | None) -> str:
    """Lines no wider than the terminal, if `stream` is one, which breaks longer ones inside words."""
    if stream is None or not stream.isatty():
        return text
    return wrapped(text, shutil.get_terminal_size().columns)


def wrapped(text: str, width: int, indent: int = 0) -> str:
    """Lines of at most `width` columns, but for longer words.

    Args:
        indent: columns before the second line and those after it.
    """
    keep: dict[str, Any] = {"break_long_words": False, "break_on_hyphens": False, "subsequent_indent": " " * indent}
    return "\n".join("\n".join(textwrap.wrap(line, width, **keep)) for line in text.split("\n"))


def say_written(file: Path, *, aside: bool = False) -> None:
    """Say where a file is; `aside`: on stderr, as stdout has only the result."""
    stream = sys.stderr if aside else sys.stdout
    print(fit_terminal(printable(f"written to {file}"), stream), file=stream)


def report_once(sentence: str) -> None:
    """Say why the run ends, outside the control: once per host, as usually all its processes have the same to say."""
    leave_word(sentence)
    alone = int(os.environ.get("LOCAL_WORLD_SIZE", 1)) == 1
    held = None if alone else first_on_host(attempt())
    if alone or held is not None:
        with suppress(OSError):
            print(fit_terminal(sentence, sys.stderr), file=sys.stderr, flush=True)
    if held is not None:
        time.sleep(1)  # by then the others have failed too, or torchrun has ended them
        held.close()


def leave_word(sentence: str) -> None:
    """Where torchrun looks for it, so that its own table, which comes last, ends in the sentence.

    It takes the first failure for the cause and counts in whole seconds: a process that it ended in the same second,
    which leaves no word, must not come before this one.
    """
    if file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()) - 1)}}
        with suppress(OSError), open(file, "w") as out:
            json.dump({"message": message}, out)


def was_reported() -> bool:
    """Whether a process of this host is in :func:`report_once`, which takes it a second."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        return probe.connect_ex(_lock_address(attempt())) in (0, errno.EAGAIN)


def attempt() -> str:
    """Names this attempt of this run among all runs on the host."""
    names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "MASTER_PORT")
    return "-".join(os.environ.get(name, "") for name in names)


def first_on_host(name: str) -> socket.socket | None:
    """A lock that is released when its process ends: for the first on this host that asks; None for the others."""
    lock = socket.socket(socket.AF_UNIX)
    try:
        lock.bind(_lock_address(name))
        lock.listen()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            lock.close()
            return None
    return lock


def _lock_address(name: str) -> str:
    return f"\0vimfast-{hashlib.sha256(name.encode()).hexdigest()}"
