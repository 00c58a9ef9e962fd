"""``vimfast`` and its subcommands."""

from __future__ import annotations

import os
import re
import subprocess
from importlib import import_module

import pytest
from runs import call, command, environment

from vimfast import __version__
from vimfast.__main__ import COMMANDS, usage


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


@pytest.mark.parametrize("flag", ["-h", "--version", "--completion=bash"])
def test_a_reader_may_have_enough_at_once(flag: str) -> None:
    """``vimfast -h | true`` ended in a traceback."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        env = {**os.environ, **environment()}
        done = subprocess.run(command("vimfast", flag), stdout=writing, stderr=subprocess.PIPE, text=True, env=env)
    finally:
        os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_an_unknown_command_is_one_sentence() -> None:
    done = call("vimfast", "trains", ok=False)
    assert done.returncode == 2
    assert done.stderr == "error: vimfast has no command 'trains'; did you mean 'train'? vimfast --help lists them\n"


def test_it_fits_into_80_columns() -> None:
    assert max(map(len, usage().splitlines())) <= 80
