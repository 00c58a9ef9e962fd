"""Compiled kernels on the disk: taken from there by later processes, unless something is wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import vimfast_kernels.llvm
from vimfast_kernels import add_layer_norm
from vimfast_kernels.llvm import machine, objects

pytestmark = pytest.mark.skipif(bool(vimfast_kernels.llvm._missing()), reason="needs llvmlite")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vimfast" / "llvm"


def test_a_kernel_is_compiled_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And what is read back computes the same."""
    compiled: list[str] = []
    make = machine._object
    monkeypatch.setattr(machine, "_object", lambda text, target: compiled.append(text) or make(text, target))
    x, weight, bias = torch.randn(5, 48), torch.randn(48), torch.randn(48)
    outputs = []
    for _ in range(2):
        machine._compiled.cache_clear()  # as in another process
        with torch.inference_mode():
            outputs.append(add_layer_norm(x, None, weight, bias, backend="llvm")[0])
    assert len(compiled) == len(list(folder.iterdir())) > 0
    assert torch.equal(*outputs)
    torch.testing.assert_close(outputs[0], F.layer_norm(x, (48,), weight, bias, 1e-5))


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def exchange(path: Path) -> None:
    """The file of another kernel lies under its name."""
    objects.kept(("another",), lambda: b"other code")
    (other,) = set(path.parent.iterdir()) - {path}
    os.replace(other, path)


def cut(path: Path) -> None:
    os.truncate(path, 40)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("spoil", [damage, exchange, cut, empty])
def test_what_is_spoiled_is_compiled_and_written_again(folder: Path, spoil: Callable[[Path], None]) -> None:
    made = objects.kept(("text", "processor"), lambda: b"code " * 20)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    assert objects.kept(("text", "processor"), fail) == made
    spoil(path)
    assert objects.kept(("text", "processor"), lambda: made) == made
    assert [path] == list(folder.iterdir())
    assert path.read_bytes() == whole


def test_all_that_it_depends_on_is_in_the_name(folder: Path) -> None:
    for names in (("text", "a processor"), ("text", "another"), ("texta", " processor")):
        assert objects.kept(names, lambda names=names: repr(names).encode()) == repr(names).encode()
    assert len(list(folder.iterdir())) == 3


def test_it_works_where_nothing_can_be_kept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.touch()  # where a folder would have to be
    assert objects.kept(("text",), lambda: b"code") == b"code"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", lambda: fail())
    assert objects.kept(("text",), lambda: b"code") == b"code"


def test_code_of_another_user_is_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.kept(("text",), lambda: b"code of somebody")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert objects.kept(("text",), lambda: b"code") == b"code"


def fail() -> bytes:
    raise RuntimeError("it is compiled again")
