"""``vimfast --completion``, in the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import call

from vimfast.__main__ import COMMANDS, main

# What bash does when TAB is pressed, as its manual describes it: the words so far, and a call of the function.
TAB = """
source ./completion
function=$(complete -p vimfast | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
tab() { COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=(); $function; echo "${COMPREPLY[*]}"; }
"""


Printed = Callable[..., str]


@pytest.fixture
def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Printed:
    """What ``vimfast`` prints when it is given some words, in this process."""

    def run(*words: str) -> str:
        monkeypatch.setattr("sys.argv", ["vimfast", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        return capsys.readouterr().out

    return run


def completes(shell: str, folder: Path, *lines: tuple[str, ...]) -> list[list[str]]:
    """What a shell offers after each of these words, the last of which is not complete."""
    if shell == "bash":
        code = TAB + "\n".join(f"tab vimfast {' '.join(repr(word) for word in line)}" for line in lines)
        command = ["bash", "--norc", "-c", code]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
        assert not done.stderr
        return [line.split() for line in done.stdout.splitlines()]
    code = "source ./completion; " + "; ".join(f'complete -C "vimfast {" ".join(line)}"; echo END' for line in lines)
    done = subprocess.run(["fish", "--no-config", "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    parts = done.stdout.split("END\n")[:-1]
    return [[line.split("\t")[0] for line in part.splitlines()] for part in parts]


@pytest.mark.parametrize("shell", ["bash", "fish"])
def test_commands_flags_and_values(shell: str, tmp_path: Path, printed: Printed) -> None:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell}")
    (tmp_path / "shards").mkdir()
    (tmp_path / "completion").write_text(printed("--completion", shell))
    commands, start, flags, negative, decoders, recipe, data, other = completes(
        shell,
        tmp_path,
        ("",),
        ("tra",),
        ("train", "--output"),
        ("train", "--no-model"),
        ("train", "--decoder", ""),
        ("train", "--config", "vim_s"),
        ("train", "--data-path", "sh"),
        ("prepare", "--res"),
    )
    assert set(COMMANDS) <= set(commands)
    assert start == ["train"]
    assert flags == ["--output-dir"]  # one spelling
    assert sorted(negative) == ["--no-model-ema", "--no-model-ema-force-cpu", "--no-model-ema-warmup"]
    assert set(decoders) == {"auto", "hardware", "cuda", "cpu"}
    assert set(recipe) == {"vim_small", "vim_small_fast", "vim_small_stride8"}
    assert [name.rstrip("/") for name in data] == ["shards"]
    assert other == ["--resize"]


def test_zsh_takes_the_script(tmp_path: Path, printed: Printed) -> None:
    if shutil.which("zsh") is None:
        pytest.skip("there is no zsh")
    (tmp_path / "completion").write_text(printed("--completion=zsh"))
    code = 'autoload -Uz compinit; compinit -D; eval "$(cat completion)"; print -r -- ${_comps[vimfast]}'
    done = subprocess.run(["zsh", "-f", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "_shtab_vimfast\n"
    assert not done.stderr


def test_other_shells_are_one_sentence() -> None:
    done = call("vimfast", "--completion", "tcsh", ok=False)
    assert done.returncode == 2
    assert done.stderr == "error: --completion is 'tcsh'; it must be one of bash, zsh, fish\n"
