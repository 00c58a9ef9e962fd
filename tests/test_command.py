"""``vimfast`` and its subcommands."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
from runs import call, command, environment

import vimfast
from vimfast import __version__
from vimfast.__main__ import COMMANDS, usage
from vimfast.cli import Parser, run_main
from vimfast.errors import UserError


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_explains_itself_by_the_name_it_was_called(name: str) -> None:
    module, _, function = COMMANDS[name].function.partition(":")
    assert callable(getattr(import_module(module), function))
    text = call("vimfast", name, "--help").stdout
    assert f"usage: vimfast {name} " in text
    assert re.search(r"\nexamples?:\s+vimfast", text)
    assert not re.search(r"--[\w-]+-$", text, re.MULTILINE)  # no line ends inside a flag
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_a_value_that_a_flag_does_not_take_is_one_sentence(name: str) -> None:
    """Whatever the flag: its name, the value, and what it must be."""
    parser = import_module(COMMANDS[name].function.partition(":")[0]).parser()
    for action in parser._actions:
        several = action.nargs if isinstance(action.nargs, int) else 1
        for value in ("abc", "-7") if action.option_strings and action.type else ():
            said = _refusal(parser, action.option_strings[0], *several * [value])
            assert re.fullmatch(rf"({action.option_strings[0]} is '?{value}'?; it must be [^;]+)?", said)


def _refusal(parser: Parser, *words: str) -> str:
    """What is said of these words; nothing where all that is wrong is that others are missing."""
    try:
        parser.parse_args(words)
    except UserError as error:
        return "" if "are required" in str(error) else str(error)
    return ""


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


_LOOK = """
import os, sys
from vimfast.cli import Parser, run_main
from vimfast.errors import UserError
from vimfast.commands.doctor import _print
from vimfast.doctor import Line

def look():
    streams = [os.readlink(f"/proc/self/fd/{number}") for number in range(3)]
    _print([Line("machine", "cores", "green", "2")])  # it ended in an AttributeError
    os.system("echo of a child")
    with open(sys.argv[1], "w") as file:
        print(*streams, sys.stdin.read(), sys.stderr.isatty(), file=file)

run_main(look)
"""


def test_closed_streams_are_nobodys(tmp_path: Path) -> None:
    """``vimfast doctor >&-`` ended in a traceback, and a file that was opened next would have been stdout."""
    words = ["sh", "-c", '"$0" -c "$1" "$2" <&- >&- 2>&-', sys.executable, _LOOK, str(tmp_path / "seen")]
    assert subprocess.run(words, env={**os.environ, **environment()}).returncode == 0
    assert (tmp_path / "seen").read_text() == "/dev/null /dev/null /dev/null  False\n"


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


PACKAGES = ("PIL", "jinja2", "msgspec", "numpy", "rich", "timm", "torch", "yaml")
WORDS = {
    "vimfast prepare": ("tree", "--out", "shards"),
    "vimfast train": ("--data-path", "tree"),
    "vimfast-prepare": ("tree", "--out", "shards"),
    "vimfast.check_data": ("tree",),
    "vimfast.export": ("run", "--out", "exported"),
    "vimfast.prepare": ("tree", "--out", "shards"),
    "vimfast.timm": ("script.py",),
    "vimfast.train": ("--data-path", "tree"),
}


def test_these_are_all_programs() -> None:
    """What can be started otherwise than by ``vimfast COMMAND``."""
    folder = Path(vimfast.__file__).parent
    programs = {
        ".".join(("vimfast", *path.relative_to(folder).with_suffix("").parts)).removesuffix(".__main__")
        for path in folder.rglob("*.py")
        if '\nif __name__ == "__main__":\n' in path.read_text()
    }
    assert programs - {"vimfast"} == {program for program in WORDS if "." in program}


@pytest.mark.parametrize("program", WORDS)
def test_a_missing_package_is_one_sentence(program: str, tmp_path: Path) -> None:
    """As after ``pip install --no-deps``, where all but ``vimfast doctor`` ended in a traceback."""
    (tmp_path / "script.py").touch()
    (tmp_path / "tree").mkdir()
    if " " in program:
        start, words = "from vimfast.__main__ import main; main()", [program.split()[1]]
    elif program == "vimfast-prepare":
        start, words = "from vimfast.prepare import main; main()", []
    else:
        start, words = f"import runpy; runpy.run_module({program!r}, run_name='__main__')", []
    code = f"import sys; sys.modules.update(dict.fromkeys({PACKAGES})); {start}"
    words = [sys.executable, "-c", code, *words, *WORDS[program]]
    env = {**os.environ, **environment()}
    done = subprocess.run(words, capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2
    assert re.fullmatch(rf"error: .*'?({'|'.join(PACKAGES)})\b.*; vimfast doctor says .*\n", done.stderr)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("show", ["tree", "--out"]),
        ("predict", ["run", "cat.jpg", "--grid"]),
        ("check", ["tree", "--sample-grid"]),
        ("bench", ["--plot"]),
    ],
)
def test_an_image_is_a_png(name: str, words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A PNG was written to ``grid.jpg`` or ``grid.foo``."""
    monkeypatch.setattr(sys, "argv", [f"vimfast {name}"])
    parser = import_module(COMMANDS[name].function.partition(":")[0]).parser()
    with pytest.raises(UserError, match=rf"^{words[-1]} is 'a/x\.foo'; it must be a name that ends in \.png, "):
        parser.parse_args([*words, "a/x.foo"])
    assert Path("a/x.PNG") in vars(parser.parse_args([*words, "a/x.PNG"])).values()


def test_an_unknown_command_is_one_sentence() -> None:
    done = call("vimfast", "trains", ok=False)
    assert done.returncode == 2
    assert done.stderr == "error: vimfast has no command 'trains'; did you mean 'train'? vimfast --help lists them\n"


def test_it_fits_into_80_columns() -> None:
    assert max(map(len, usage().splitlines())) <= 80


BROKEN = {
    "an extension": "raise ImportError('libcudart.so.12: cannot open shared object file: No such file or directory')",
    "a library": "import ctypes; ctypes.CDLL('libcudart.so.no')",
    "an operator": "raise RuntimeError('operator torchvision::nms does not exist')",
    "a part of it": "from broken_package import nothing",
}


@pytest.mark.parametrize("text", BROKEN.values(), ids=BROKEN)
def test_a_broken_package_is_one_sentence(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the CUDA that it is built for is missing."""
    (tmp_path / "broken_package").mkdir()
    (tmp_path / "broken_package" / "__init__.py").touch()
    (tmp_path / "broken_package" / "part.py").write_text(text)
    info = tmp_path / "broken_distribution-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-distribution\nVersion: 1\n")
    (info / "top_level.txt").write_text("broken_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "broken_package", raising=False)
    with pytest.raises(SystemExit) as end:
        run_main(lambda: import_module("broken_package.part").x)
    assert end.value.code == 2
    fix = "pip install --force-reinstall broken-distribution, or see what vimfast doctor says of it"
    said = rf"error: broken_package is installed and cannot be imported \((libcudart|operator|cannot im).*\); {fix}\n"
    assert re.fullmatch(said, capsys.readouterr().err)


def test_an_error_of_a_package_in_use_is_not_one_of_its_import() -> None:
    def fail() -> int:
        return int(json.loads("no JSON"))

    for wrong in (fail, lambda: import_module("vimfast.no_such_module"), lambda: exec("from vimfast import no_name")):
        with pytest.raises((ValueError, ImportError)):
            run_main(wrong)


def full(buffered: bool) -> io.TextIOWrapper:
    return io.TextIOWrapper(open("/dev/full", "wb", -1 if buffered else 0), write_through=not buffered)


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("does", ["print", "--help"])
def test_a_full_stdout_is_one_sentence(
    does: str, buffered: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with full(buffered) as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        with pytest.raises(SystemExit) as end:
            run_main((lambda: print("x")) if does == "print" else lambda: Parser("x", "y").parse_args([does]))
        assert end.value.code == 2
    said = "error: stdout cannot be written (No space left on device); make room there, or send it elsewhere\n"
    assert capsys.readouterr().err == said


def test_another_full_disk_keeps_its_traceback() -> None:
    def write() -> None:
        with full(buffered=True) as file:
            file.write("x")

    with pytest.raises(OSError, match="No space left"):
        run_main(write)
