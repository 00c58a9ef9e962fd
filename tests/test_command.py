"""``vimfast`` and its subcommands."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from runs import call, command, environment

from vimfast import __version__
from vimfast.__main__ import COMMANDS, usage
from vimfast.cli import run_main


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_by_the_name_it_was_called(name: str) -> None:
    module, _, function = COMMANDS[name].function.partition(":")
    assert callable(getattr(import_module(module), function))
    text = call("vimfast", name, "--help").stdout
    assert f"usage: vimfast {name} " in text
    assert re.search(r"\nexamples?:\s+vimfast", text)
    assert not re.search(r"--[\w-]+-$", text, re.MULTILINE)  # no line ends inside a flag
    assert max(map(len, text.splitlines())) <= 80


def test_it_lists_its_commands_without_importing_torch() -> None:
    text = call("vimfast").stdout
    assert text == call("vimfast", "--help").stdout
    assert re.findall(r"^  (\w+)", text, re.MULTILINE) == list(COMMANDS)
    assert call("vimfast", "--version").stdout == f"vimfast {__version__}\n"
    imported = call("vimfast", "--version", importtime=True).stderr
    assert "vimfast.cli" in imported
    assert "torch" not in imported


@pytest.mark.parametrize("flags", [["-h"], ["--version"], ["--completion=bash"], ["prepare", "-h"]])
def test_a_reader_may_have_enough_at_once(flags: list[str]) -> None:
    """``vimfast -h | true`` ended in a traceback."""
    assert _unread(*flags) == (0, "")


def test_a_reader_of_results_may_have_enough(tree: Path) -> None:
    """``vimfast predict ... | head`` ended in a traceback."""
    assert _unread("check", str(tree), "--json") == (128 + signal.SIGPIPE, "")


def _unread(*words: str) -> tuple[int, str]:
    """Exit status and stderr of ``vimfast`` when nobody reads its output."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        env = {**os.environ, **environment()}
        done = subprocess.run(command("vimfast", *words), stdout=writing, stderr=subprocess.PIPE, text=True, env=env)
    finally:
        os.close(writing)
    return done.returncode, done.stderr


def test_a_broken_pipe_inside_is_a_bug() -> None:
    with pytest.raises(BrokenPipeError):
        run_main(_broken)


def _broken() -> None:
    raise BrokenPipeError


@pytest.mark.parametrize("name", ["prepare", "train"])
def test_a_missing_package_is_one_sentence(name: str) -> None:
    """As after ``pip install --no-deps``, where each command but ``doctor`` ended in a traceback."""
    program = "import sys; sys.modules['yaml'] = sys.modules['rich'] = None; from vimfast.__main__ import main; main()"
    env = {**os.environ, **environment()}
    done = subprocess.run([sys.executable, "-c", program, name, "-h"], capture_output=True, text=True, env=env)
    assert done.returncode == 2
    assert re.fullmatch(r"error: .*'?(yaml|rich)\b.*; vimfast doctor says what is missing .*\n", done.stderr)


def test_an_unknown_command_is_one_sentence() -> None:
    done = call("vimfast", "trains", ok=False)
    assert done.returncode == 2
    assert done.stderr == "error: vimfast has no command 'trains'; did you mean 'train'? vimfast --help lists them\n"


def test_it_fits_into_80_columns() -> None:
    assert max(map(len, usage().splitlines())) <= 80
