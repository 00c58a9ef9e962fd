"""Runs under torchrun for the tests of what ends them: started, watched, hit, and looked at for what is left."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class Run:
    """``tests/slow_train.py`` under torchrun (or alone, with no processes), its output in a file.

    Everything it starts has a word in its environment that is this run's own, so what is left of it can be found and
    ended.
    """

    def __init__(self, *flags: str, processes: int = 2, launcher: tuple[str, ...] = (), **environment: str) -> None:
        self.output = Path(tempfile.mkstemp(prefix="run-", suffix=".txt")[1])
        self.word = f"VIMFAST_TEST_RUN={self.output.name}"
        torchrun = ("-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone", *launcher)
        script = str(Path(__file__).parent / "slow_train.py")
        command = [sys.executable, *(torchrun if processes else ()), script, *flags]
        root = Path(__file__).parent.parent
        paths = os.pathsep.join(filter(None, (str(root), str(root / "kernels"), os.environ.get("PYTHONPATH"))))
        name, value = self.word.split("=")
        extra = {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths, name: value, **environment}
        with open(self.output, "w") as file:
            self.process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, **extra}, start_new_session=True
            )

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)
        self.process.wait()
        self.output.unlink()

    @property
    def text(self) -> str:
        return self.output.read_text()

    def lines(self, start: str) -> list[str]:
        return [line for line in self.text.splitlines() if line.startswith(start)]

    def left(self) -> list[int]:
        """Processes of this run that live."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                if self.word.encode() in (path / "environ").read_bytes().split(b"\0"):
                    state = re.search(r"^State:\s+(\w)", (path / "status").read_text(), re.MULTILINE)
                    if state and state[1] != "Z":
                        found.append(int(path.name))
            except OSError:  # noqa: PERF203  # it has ended
                continue
        return found

    def wait_for(self, pattern: str, seconds: float = 180) -> re.Match[str]:
        """Until the output holds `pattern`."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.text)):
            assert time.monotonic() < end, self.text
            assert self.process.poll() is None or re.search(pattern, self.text), self.text
            time.sleep(0.05)
        return found

    def ranks(self, epoch: int = 0, step: int = 1) -> dict[int, int]:
        """Process ids by rank, once every one of two is in that step."""
        return {r: int(self.wait_for(rf"rank {r} pid (\d+) step {epoch}/{step}\b")[1]) for r in (0, 1)}

    def gone_within(self, seconds: float) -> float:
        """Seconds until no process of the run lives."""
        begin = time.monotonic()
        while self.left():
            self.process.poll()
            assert time.monotonic() - begin < seconds, f"{self.left()} are left behind:\n{self.text}"
            time.sleep(0.1)
        self.process.wait()
        return time.monotonic() - begin
