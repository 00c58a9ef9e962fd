"""The line that says what a command is doing."""

from __future__ import annotations

import io
import os
import sys

import pytest

from vimfast.cli import LiveLine, live


def test_on_a_terminal_it_counts_seconds_stays_on_its_line_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = os.openpty()
    written = b""

    def wait_for(text: bytes) -> None:
        nonlocal written
        while text not in written:
            written += os.read(ours, 1 << 16)

    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(live, "_TICK", 0.05)
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        with LiveLine() as line:
            line.say("measuring\nthe loader of a folder with a long name")
            wait_for(b"1 s: measuring\\nthe loader of a folder")
            line.say("done")
            wait_for(b"done ...")
    written += os.read(ours, 1 << 16)
    os.close(ours)
    states = written.decode().split("\r\x1b[K")[1:]
    assert states[0] == "measuring\\nthe loader of a folder with a"[:39]
    assert states[-1] == ""
    assert max(map(len, states)) == 39


def test_elsewhere_it_is_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    with LiveLine() as line:
        line.say("measuring")
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
