"""Checkpoints written while training continues."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import torch
from torch import Tensor


class Background:
    """Does one piece of work after another on a thread of its own. An error is raised by the next call."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, "checkpoints")
        self._work: Future[None] | None = None

    def submit(self, work: Callable[[], None]) -> None:
        """Begin on `work` once what was submitted before is done, for which this waits."""
        self.finish()
        self._work = self._thread.submit(work)

    def check(self) -> None:
        """Raise the error of what was submitted last, if it has failed by now."""
        if self._work is not None and self._work.done():
            self.finish()

    def finish(self) -> None:
        """Wait until all is done."""
        work, self._work = self._work, None
        if work is not None:
            work.result()

    def close(self, patience: float | None = None) -> None:
        """End the thread, after what it has begun, but for an error of it: for the end of a run.

        Args:
            patience: seconds to wait at most.
        """
        if self._work is not None:
            wait([self._work], patience)
        self._thread.shutdown(wait=False)


def copied(state: Any) -> Any:
    """The same dicts, lists and tuples with copies of their tensors in host memory, as of now on the current stream.

    Those from a GPU arrive when the stream has come so far; the host does not wait for it.
    """
    if isinstance(state, Tensor):
        copy = torch.empty(state.shape, dtype=state.dtype, pin_memory=state.is_cuda)
        return copy.copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        return {name: copied(value) for name, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copied(value) for value in state)
    return state
