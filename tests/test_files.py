"""A file is the old one or the new one, whole."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from vimfast.files import atomic_write, try_to_write, write_bytes, write_text


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")
    with atomic_write(path) as file:
        file.write(b"new")
        file.flush()
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"
    write_text(path, "grün\n")
    assert path.read_bytes() == "grün\n".encode()
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_leaves_no_trace(tmp_path: Path, error: type[BaseException]) -> None:
    path = tmp_path / "file"
    with pytest.raises(error), atomic_write(path) as file:  # noqa: PT012
        file.write(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="No such file"):
        write_bytes(tmp_path / "nowhere" / "file", b"")


def test_what_is_no_file_stays_what_it_is(tmp_path: Path) -> None:
    """A device, when root writes to it: /dev/null would become a file."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    for link in (path, tmp_path / "link"):
        if link != path:
            link.symlink_to(path)
        for write in (lambda out: write_bytes(out, b""), try_to_write):
            with pytest.raises(OSError, match="not a regular file, but a FIFO"):
                write(link)
    assert path.is_fifo()
    with pytest.raises(IsADirectoryError):
        write_bytes(tmp_path, b"")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "pipe"]


def test_trying_to_write_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    try_to_write(path)
    assert list(tmp_path.iterdir()) == []
    write_bytes(path, b"old")
    try_to_write(path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(OSError, match="No such file"):
        try_to_write(tmp_path / "nowhere" / "file")


@pytest.mark.parametrize("failed", [errno.EINVAL, errno.EIO])
def test_a_file_system_that_cannot_sync_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: int) -> None:
    """Some network file systems; a disk that fails is another matter."""
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(failed, os.strerror(failed))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    if failed == errno.EIO:
        with pytest.raises(OSError, match=os.strerror(failed)):
            write_bytes(tmp_path / "file", b"new")
    else:
        write_bytes(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
