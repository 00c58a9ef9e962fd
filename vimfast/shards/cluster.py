"""Shards made by a cluster of Ray: a task a shard, on whatever node has a core to spare.

A shard is a pure function of its part of the plan, so Ray may repeat a task whose process or node is lost. Nodes read
images and write shards by themselves, so both have to be where all of them see them: on a shared file system or in an
object store.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar
from urllib.parse import urlsplit

from vimfast.cli import LiveLine
from vimfast.errors import UserError
from vimfast.shards.workers import Pace, progress, tick_with

P = TypeVar("P")
T = TypeVar("T")

_RETRIES = 3  # of a task whose process or node is lost; an image that ends a process each time is not tried for ever
_REPORT_SECONDS = 0.5  # between two reports of a task
_PATIENCE = 10.0  # seconds, for the cluster's head to answer
# A gRPC client begins with these, and the server's first frame is of type 4 as well: RFC 9113, 3.4.
_PREFACE, _SETTINGS = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 4


class RayCluster:
    """What runs functions in a cluster, or where there is none on this machine.

    Args:
        address: of the cluster's head, such as ``10.0.0.1:6379``; None: of ``RAY_ADDRESS``, or this machine alone.
        workers: tasks at a time; None: one for each core of the cluster.
    """

    def __init__(self, address: str | None, workers: int | None) -> None:
        self._address, self._workers = address, workers

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Connected in the block.

        Raises:
            UserError: Ray is not installed, or there is no cluster: within `_PATIENCE` where nothing answers.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        # Ray's worker processes run whatever Python it is that runs this one; `uv run` would build another.
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        address = self._address or os.environ.get("RAY_ADDRESS") or None
        if address is not None:  # Ray would try 20 times, 41 s each; it reads this when it is imported
            os.environ.setdefault("RAY_NUM_REDIS_GET_RETRIES", "1")
        try:
            import ray
        except ModuleNotFoundError:
            raise UserError("--engine ray needs Ray, which is not installed", "pip install 'vimfast[ray]'") from None
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR", "configure_logging": False}
        if address is None:  # and not the cluster that somebody else may have started on this machine
            options |= {"num_cpus": self._workers, "include_dashboard": False}
        try:
            with LiveLine() as live:
                live.say("starting Ray" if address is None else f"connecting to Ray at {address}")
                if address is not None:
                    address = _meant(address)
                    _expect_answer(address)
                ray.init(address=address or "local", **options)
        except (OSError, RuntimeError, ValueError) as error:
            where = address or "this machine"
            # Its first sentence: those after it advise flags of Ray's own.
            reason = re.split(r"\. |\n", str(error).strip())[0].rstrip(".:") or type(error).__name__
            raise UserError(
                f"no Ray cluster can be used at {where} ({reason})",
                "give the address that ray start --head printed, on a node of the cluster, and set RAY_AUTH_MODE=token "
                "if the cluster asks for one",
            ) from None
        try:
            yield
        finally:
            ray.shutdown()

    def run(
        self, function: Callable[..., T], todo: Sequence[P], arguments: Callable[[P], tuple[Any, ...]], pace: Pace
    ) -> Iterator[tuple[P, T]]:
        """Do `function` for each shard; what came of them, as they are done.

        Args:
            arguments: of `function`, for one of `todo`; asked for only as tasks can start.

        Raises:
            UserError: of a task, or a task was lost with its process or node again and again.
        """
        if not todo:
            return
        import ray

        tally = _tally()
        task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_task)
        following = iter(enumerate(todo))
        running: dict[Any, P] = {}
        reported = 0.0
        with progress(pace) as show:
            try:
                while True:
                    while len(running) < self._most() and (following_one := next(following, None)) is not None:
                        number, place = following_one
                        running[task.remote(tally, number, function, arguments(place))] = place
                    if not running:
                        break
                    done, _ = ray.wait(list(running), num_returns=1, timeout=_REPORT_SECONDS)
                    for reference in done:
                        place = running.pop(reference)
                        yield place, _result(reference, place)
                    if time.monotonic() - reported >= _REPORT_SECONDS:
                        reported, pace.done = time.monotonic(), _total(tally, pace.done)
                        show()
            finally:
                for reference in running:
                    with suppress(Exception):
                        ray.cancel(reference)
                if running:  # each removes what it has half written
                    ray.wait(list(running), num_returns=len(running), timeout=10)
                pace.done = _total(tally, pace.done)
                ray.kill(tally)

    def _most(self) -> int:
        """Tasks to be given to Ray at a time: some wait, so that no core does."""
        import ray

        return self._workers or 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))


def _meant(address: str) -> str:
    """The HOST:PORT that Ray means by ``auto``, of a cluster that may have ended since; any other address is itself.

    Raises:
        OSError: there is none.
    """
    if address == "auto":
        with suppress(ImportError):  # of a Ray that has it elsewhere, which then looks by itself
            from ray._private.services import canonicalize_bootstrap_address_or_die

            return str(canonicalize_bootstrap_address_or_die(address))
    return address


def _expect_answer(address: str) -> None:
    """Return if a gRPC server answers at HOST:PORT, or if `address` is of another form, which is for Ray to judge.

    Ray itself tries for 41 s, and says neither what it does nor why it fails.

    Raises:
        OSError: none does; says why.
    """
    try:
        parts = urlsplit(address if "://" in address else f"//{address}")
        host, port = parts.hostname, parts.port
    except ValueError:
        return
    if host is None or port is None:
        return
    with _connected(host, port) as head:
        if os.environ.get("RAY_USE_TLS", "0") != "0":  # what follows would have to be encrypted
            return
        head.sendall(_PREFACE + bytes([0, 0, 0, _SETTINGS, 0, 0, 0, 0, 0]))
        try:
            first = head.recv(9, socket.MSG_WAITALL)
        except TimeoutError:
            raise TimeoutError(f"it accepts a connection and says nothing for {_PATIENCE:.0f} s") from None
        except ConnectionError:
            first = b""
    if len(first) < 9 or first[3] != _SETTINGS:
        raise ConnectionError("something other than Ray answers there")


def _connected(host: str, port: int) -> socket.socket:
    try:
        return socket.create_connection((host, port), timeout=_PATIENCE)
    except TimeoutError:
        raise TimeoutError(f"no answer within {_PATIENCE:.0f} s") from None
    except OSError as error:
        raise ConnectionError(error.strerror or str(error)) from None


def _result(reference: Any, place: Any) -> Any:
    import ray

    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"a task of the cluster was lost {_RETRIES + 1} times ({reason})",
            "run again with fewer --workers, for memory may be short; it resumes",
        ) from None


# On the nodes


def _task(tally: Any, number: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    """Do it, and report now and then how many images are done."""
    done, reported = 0, time.monotonic()

    def tick(name: str, count: int) -> None:
        nonlocal done, reported
        done += count
        if time.monotonic() - reported >= _REPORT_SECONDS:
            reported = time.monotonic()
            tally.note.remote(number, done)

    with tick_with(tick):
        result = function(*arguments)
    tally.note.remote(number, done)
    return result


class _Tally:
    """How many images each task has done; one that is repeated counts from 0 again."""

    def __init__(self) -> None:
        self._done: dict[int, int] = {}

    def note(self, number: int, done: int) -> None:
        self._done[number] = done

    def total(self) -> int:
        return sum(self._done.values())


def _tally() -> Any:
    """On this node, which is not going to be lost without this process."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0, scheduling_strategy=here)(_Tally).remote()


def _total(tally: Any, otherwise: int) -> int:
    import ray

    try:
        return int(ray.get(tally.total.remote(), timeout=5))
    except ray.exceptions.RayError:
        return otherwise
