"""Runs as a user starts them: the trainer inside this process, as a command, and under torchrun."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import WatchedFork, run_forked, run_program
from forking_torchrun import torchrun
from watch import Watched

from vimfast.checkpoint import load_checkpoint
from vimfast.config import load_config
from vimfast.data.views import Stages
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.processes.control import Control
from vimfast.train.build import Hooks, build

ROOT = Path(__file__).parent.parent
PACED = str(ROOT / "tests" / "paced_train.py")
TORCHRUN = ("-m", "torch.distributed.run")
FORKING = (str(ROOT / "tests" / "forking_torchrun.py"),)
TIMEOUT = 300.0  # seconds for what takes a few; only a run that hangs takes so long

RECIPE = {
    "model": {
        "model": "vim_tiny_patch16_224",
        "input_size": 32,
        "drop_path": 0.2,
        "model_kwargs": {"patch_size": 8, "stride": 8, "depth": 2, "embed_dim": 32},
    },
    "data": {"batch_size": 4, "num_workers": 1},
    "schedule": {"epochs": 2, "warmup_epochs": 0, "sched_on_updates": True},
    "ema": {"model_ema_decay": 0.9},
    "run": {"device": "cpu", "log_every": 2},
}

# A model and steps so small that a run is nearly all start-up: for what is done to its processes.
TINY = {
    "model": {
        "model": "vim_tiny_patch16_224",
        "input_size": 40,
        "model_kwargs": {"patch_size": 8, "stride": 8, "depth": 1, "embed_dim": 32},
    },
    "data": {"batch_size": 2, "num_workers": 1},
    "augment": {"aa": "none", "reprob": 0.0},
    "schedule": {"epochs": 100, "warmup_epochs": 0},
    "run": {"device": "cpu", "log_every": 50},
}
STOPPED = r"stopped at epoch (\d+), step (\d+) of \d+; \S+ holds it, resume with"


def environment() -> dict[str, str]:
    """What a run needs: this checkout's modules before any that are installed, and few threads."""
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def command(program: str, *flags: str, processes: int = 0, launcher: Sequence[str] = TORCHRUN) -> list[str]:
    """The words that run a module (or a .py file), under torchrun with `processes`."""
    torchrun = [*launcher, f"--nproc_per_node={processes}", "--standalone"] if processes else []
    return [sys.executable, *torchrun, *([program] if program.endswith(".py") else ["-m", program]), *flags]


def call(
    program: str, *flags: str, processes: int = 0, ok: bool = True, fresh: bool = False, importtime: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run a module to its end, as a user would.

    Args:
        processes: of torchrun; 0: no torchrun.
        fresh: in a new interpreter, as a user's are, rather than in a fork of one that has everything imported.
        importtime: its imports are in stderr; it is fresh, too.
    """
    if fresh or importtime:
        env = {**os.environ, **environment(), **({"PYTHONPROFILEIMPORTTIME": "1"} if importtime else {})}
        done = subprocess.run(command(program, *flags, processes=processes), capture_output=True, text=True, env=env)
    elif processes:
        done = run_forked(torchrun, *command(program, *flags, processes=processes)[3:])
    else:
        done = run_forked(run_program, program, *flags)
    assert not ok or done.returncode == 0, done.stdout + done.stderr
    return done


def start(
    program: str,
    *flags: str,
    processes: int = 0,
    launcher: Sequence[str] = FORKING,
    fresh: bool = False,
    **env: str,
) -> Watched:
    """A run to be followed, signalled and waited for.

    Args:
        processes, fresh: as :func:`call` has them.
        launcher: of the processes; torchrun itself is fresh, too.
    """
    words, env = command(program, *flags, processes=processes, launcher=launcher), {**environment(), **env}
    if fresh or (processes and launcher[: len(FORKING)] != FORKING):
        return Watched(words, env=env)
    if processes:
        return WatchedFork(torchrun, *words[1 + len(FORKING) :], env=env)
    return WatchedFork(run_program, program, *flags, env=env)


def wait_until_read(settings: Path, run: Watched) -> None:
    """Until a process waits for its settings, a named pipe. They never end, as it stays open."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and run.process.poll() is None:
        with suppress(OSError):  # nobody reads
            os.open(settings, os.O_WRONLY | os.O_NONBLOCK)
            return
        time.sleep(0.01)
    raise AssertionError(run.text)


def assert_gone(run: Watched, within: float) -> None:
    """No process of the run is left after so many seconds, and all its output has been read."""
    left = run.gone_within(within)
    assert not left, f"{list(left)} are left after {within:.0f} s:\n{run.text}"
    run.wait(TIMEOUT)


def train(*flags: str, hooks: Hooks | None = None, control: Control | None = None, stage: Stages | None = None) -> Any:
    """A run inside this process: a TrainingRun or an EvaluationRun, closed."""
    with build(load_config(list(flags)), World(), control, hooks=hooks, stage=stage) as run:
        run.run()
    return run


class Stops(Control):
    """Told to stop at a place, as a signal would tell it."""

    def __init__(self, place: str) -> None:
        super().__init__(World())
        self.at = place

    def should_stop(self) -> bool:
        return self.place().startswith(self.at)


def refused(*flags: str) -> str:
    """The sentence that a run inside this process is refused with."""
    with pytest.raises(UserError) as error:
        train(*flags)
    sentence = str(error.value)
    assert "\n" not in sentence
    return sentence


def same(one: dict, two: dict) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def assert_holds(folder: Path, place: re.Match[str]) -> None:
    """The last checkpoint is of the place that a match of STOPPED says."""
    state = load_checkpoint(folder / "checkpoint.pth")
    assert (state["epoch"], state["step"]) == tuple(map(int, place.groups()))


def records(folder: Path) -> list[dict[str, Any]]:
    """The run's ``log.txt``."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def differences(one: Path, two: Path) -> list[str]:
    """Names of the tensors and values in which the last checkpoints of two run folders differ."""
    states = [load_checkpoint(folder / "checkpoint.pth") for folder in (one, two)]
    flat = [dict(_leaves({part: state[part] for part in ("model", "model_ema", "optimizer")})) for state in states]
    assert flat[0].keys() == flat[1].keys()
    return [name for name, value in flat[0].items() if not _equal(value, flat[1][name])]


def _leaves(value: Any, name: str = "") -> list[tuple[str, Any]]:
    if isinstance(value, dict):
        value = value.items()
    elif isinstance(value, (list, tuple)):
        value = enumerate(value)
    else:
        return [(name, value)]
    return [leaf for key, inner in value for leaf in _leaves(inner, f"{name}/{key}")]


def _equal(one: Any, two: Any) -> bool:
    return torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
