"""An error for the user: a problem and its fix, one sentence."""

from __future__ import annotations

import errno
import os
import pickle
import re
import socket
from pathlib import Path

import pytest
import torch

from vimfast import dist
from vimfast.data.cache import Cache
from vimfast.errors import UserError, counted, duration, lacks_memory
from vimfast.shards.convert import locked
from vimfast.train.folder import RunFolder


@pytest.mark.parametrize(("fix", "sentence"), [("use 1", "it is 0; a; use 1"), (None, "it is 0; a")])
def test_a_problem_and_its_fix(fix: str | None, sentence: str) -> None:
    error = UserError("it is 0; a", fix)
    for each in (error, pickle.loads(pickle.dumps(error))):
        assert (each.problem, each.fix, str(each)) == ("it is 0; a", fix, sentence)


def test_one_is_singular() -> None:
    said = [counted(number, what) for number in (1, 2000) for what in ("train epoch", "class", "batch")]
    assert said == ["1 train epoch", "1 class", "1 batch", "2,000 train epochs", "2,000 classes", "2,000 batches"]


@pytest.mark.parametrize(
    ("number", "fix"),
    [
        (errno.ENOSPC, "make room there, or "),
        (errno.EDQUOT, "make room there, or "),
        (errno.EACCES, "fix its permissions, or "),
        (errno.EPERM, "fix its permissions, or "),
        (errno.EROFS, "mount it writable, or "),
        (errno.ENOENT, ""),
        (errno.ENOTDIR, ""),
    ],
)
def test_a_folder_that_cannot_be_made_is_advised_on_by_its_error(
    number: int, fix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of training, of conversions and of the cache."""

    def refuse(self: Path, **_: bool) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    out = Path("/nowhere/out")
    for make, other in (
        (lambda: RunFolder(out, is_main=True), "choose another folder"),
        (lambda: locked(out).__enter__(), "choose another folder"),
        (lambda: Cache(out, None), "give a folder on a disk of this machine"),
    ):
        with pytest.raises(UserError) as error:
            make()
        assert str(error.value).endswith(f"({os.strerror(number)}); {fix}{other}")


def test_a_question_ends_its_own_sentence() -> None:
    assert str(UserError("no 'vmi'; did you mean 'vim'?", "see --help")) == "no 'vmi'; did you mean 'vim'? see --help"


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:126] . DefaultCPUAllocator: can't allocate memory: you tried ..."),
        MemoryError(),
    ],
)
def test_too_little_memory_by_any_name(error: Exception) -> None:
    assert lacks_memory(error)
    assert not lacks_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))


@pytest.mark.parametrize(
    ("device", "local_rank", "processes", "sentence"),
    [
        ("auto", 0, 4, "4 processes requested but only 2 GPUs are visible; start at most 2"),
        ("cuda:5", 0, 1, "--device is 'cuda:5' but only 2 GPUs are visible; give a lower number, or cuda"),
    ],
)
def test_more_gpus_than_there_are(
    device: str, local_rank: int, processes: int, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=f"^{re.escape(sentence)}$"):
        dist._device(device, local_rank, processes)


def test_where_the_processes_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of these ended in torch's traceback."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="WORLD_SIZE is 2 and MASTER_ADDR is not set; start"):
        dist.start("cpu")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with socket.create_server(("", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("MASTER_PORT", str(port))
        with pytest.raises(UserError, match=f"port {port} of 127.0.0.1, which another program is using; choose"):
            dist.start("cpu")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(UserError, match=f"rank 0 does not answer at 127.0.0.1, port {port} .*; check MASTER_ADDR"):
        dist.start("cpu", timeout=0.5)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0:00:00"),
        (59.4, "0:00:59"),
        (59.6, "0:01:00"),
        (60.0, "0:01:00"),
        (3599.0, "0:59:59"),
        (3599.6, "1:00:00"),
        (86399.6, "24:00:00"),
        (400_000.0, "111:06:40"),
    ],
)
def test_times_have_one_format(seconds: float, text: str) -> None:
    assert duration(seconds) == text
