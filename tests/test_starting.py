"""Signals and the end of torchrun before a run has its control.

The settings are a named pipe, so a run that is started waits for them, however fast the machine is, and never imports
torch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
from pathlib import Path

import pytest
from runs import TIMEOUT, assert_gone, environment, start, wait_until_read
from watch import Watched

from vimfast.cli import reporting

NOTHING = "stopped before the first step; there is nothing to save"
UNDER_TORCHRUN = {"TORCHELASTIC_RUN_ID": f"test {os.getpid()}", "LOCAL_WORLD_SIZE": "2", "WORLD_SIZE": "2"}


@pytest.fixture
def settings(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "settings.yaml")
    return tmp_path / "settings.yaml"


@pytest.mark.parametrize(("number", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGUSR1", 75), ("SIGHUP", 75)])
def test_a_signal_ends_a_run_that_starts(number: str, status: int, settings: Path) -> None:
    with start("vimfast.train", "--config", str(settings), fresh=True) as run:
        wait_until_read(settings, run)
        run.process.send_signal(getattr(signal, number))
        assert run.wait(TIMEOUT) == status
        assert run.text == f"{number} received: {NOTHING}\n"


def test_a_process_that_starts_after_torchrun_has_ended(settings: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    store = {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with start("vimfast.train", "--config", str(settings), fresh=True, **UNDER_TORCHRUN, **store) as run:
        assert run.wait(TIMEOUT) == 75
        assert run.text == f"torchrun is gone: {NOTHING}\n"


def launch(settings: Path, tmp_path: Path) -> tuple[Watched, list[int]]:
    """Two processes with a parent, as torchrun has them, each waiting for settings of its own; their process ids."""
    second = tmp_path / "second.yaml"
    os.mkfifo(second)
    command = [sys.executable, "-m", "vimfast.train", "--config"]
    parent = f"""
import subprocess, sys
ranks = [subprocess.Popen([*{command}, path], start_new_session=True) for path in {[str(settings), str(second)]}]
print("ranks", *(rank.pid for rank in ranks), flush=True)
print("statuses", *(rank.wait() for rank in ranks), flush=True)
"""
    (tmp_path / "parent.py").write_text(parent)
    run = start(str(tmp_path / "parent.py"), fresh=True, **UNDER_TORCHRUN)
    found = run.wait_for(r"^ranks (\d+) (\d+)$", TIMEOUT)
    for path in (settings, second):
        wait_until_read(path, run)
    return run, [int(pid) for pid in found.groups()]


def test_processes_end_with_torchrun(settings: Path, tmp_path: Path) -> None:
    run, _ = launch(settings, tmp_path)
    with run:
        run.process.kill()
        assert_gone(run, 10)
        assert run.err == f"torchrun is gone: {NOTHING}\n"


def test_processes_that_end_together_say_it_once(settings: Path, tmp_path: Path) -> None:
    run, ranks = launch(settings, tmp_path)
    with run:
        for pid in ranks:
            os.kill(pid, signal.SIGTERM)
        run.wait_for("^statuses 143 143$", TIMEOUT)
        assert run.err == f"SIGTERM received: {NOTHING}\n"


def test_a_process_that_is_ended_because_another_has_failed_is_silent(
    settings: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in UNDER_TORCHRUN.items():
        monkeypatch.setenv(name, value)
    word = reporting.first_on_host(reporting.attempt())
    assert word is not None
    with start("vimfast.train", "--config", str(settings), fresh=True) as run:
        wait_until_read(settings, run)
        word.settimeout(TIMEOUT)
        word.accept()  # it has seen that another says why the run ends
        word.close()
        run.process.send_signal(signal.SIGTERM)
        assert run.wait(TIMEOUT) == 143
        assert not run.text


def test_a_package_that_cannot_be_imported_is_named(tmp_path: Path) -> None:
    """It was "cannot import name 'build'": a thread imports too, and fails while the main thread waits for it."""
    (tmp_path / "timm").mkdir()
    (tmp_path / "timm" / "__init__.py").write_text("import time\ntime.sleep(2)\nraise ImportError('timm is broken')\n")
    paths = os.pathsep.join([str(tmp_path), environment()["PYTHONPATH"]])
    with start("vimfast.train", "--data-path", "x", "--device", "cpu", fresh=True, PYTHONPATH=paths) as run:
        assert run.wait(TIMEOUT) == 2
        assert run.err.startswith("error: timm is installed and cannot be imported (timm is broken); pip install ")
