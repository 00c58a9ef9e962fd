"""The control of a run: signals, the vote on where to stop, and the end of all processes when one of them fails.

A watch thread in each process waits for signals and messages while the main thread trains; the one of rank 0 has the
hub (:class:`vimfast.processes.hub.Hub`), which decides for all. All that this costs a training step is a lock: it
involves no collective and never waits for the device.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import wait
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

from vimfast import dist
from vimfast.cli import backstop, exit_now, first_on_host
from vimfast.dist import World
from vimfast.errors import UserError, unusable_package
from vimfast.processes import farewell
from vimfast.processes.hub import (
    COME_AGAIN,
    CRASHED,
    FAULT,
    RANK_LOST,
    STALLED,
    STOPPED,
    USER_ERROR,
    Hub,
    Message,
    Peer,
    Ticks,
    hub_lost,
)
from vimfast.processes.meeting import Links, meet
from vimfast.processes.starting import (
    SIGNALS,
    TWICE,
    Launcher,
    Starting,
    blurs_signals,
    find_launcher,
    listen,
    wake_sockets,
)

BEAT = 1.0  # seconds between two signs of life
LEAVING = 5.0  # seconds for everything after the last goodbye
FAREWELL = 3.0  # seconds to report an error in
# Seconds to save the place in when the launcher is gone: the scheduler may be killing everything, or a second SIGTERM
# ended torchrun while its processes were still saving after the first.
ORPHANED, ORPHANED_STOPPING = 9.0, 30.0


class Stopped(Exception):
    """The run was told to stop, and all processes stop at this place."""


class Control:
    """Stops a run when told to, and ends it on all processes when it cannot continue.

    A program's main enters it right after the process group. From then on it owns the process, and ends it on an error.
    The main thread asks :meth:`should_stop` before every step, at the same places on every process, and says what it is
    :meth:`doing`. A control that is never entered never stops anything: for a trainer inside another program.

    Args:
        world: this process among the others.
        stall_timeout: seconds without progress after which the run ends.
        folder: the run folder, for ``train.log`` and the stacks of a stall, if there is one.
        starting: what has listened to signals until now, to be relieved.
    """

    def __init__(
        self, world: World, stall_timeout: float = 600.0, folder: Path | None = None, starting: Starting | None = None
    ) -> None:
        self.world, self.stall_timeout, self.folder = world, stall_timeout, folder
        self.place: Callable[[], str] = lambda: ""  # in the run
        self.promise = "ending"  # what the run does when told to stop, for the answer to a signal
        self.say: Callable[[str], None] = lambda text: farewell.print_at_once(f"{text}\n", sys.stdout)
        self.let_go: Callable[[], None] = lambda: None  # of the terminal, before the last words
        self.status = 0  # to exit with
        self.fault: UserError | None = None  # of one of the processes, for which the run was told to stop
        self._ticks = Ticks()
        self._doing, self._since = "starting", time.monotonic()
        self._beat = min(BEAT, stall_timeout / 6)
        self._watching = self._leaving = False
        self._left = threading.Event()
        # The watch thread's own
        self._out: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._own: deque[Message] = deque()  # from the hub to its own rank
        self._hub: Hub | None = None
        self._links = Links([], "", None, {})
        self._heard = time.monotonic()  # the hub
        self._stopping = ""
        self._interrupted: float | None = None
        self._starting = starting
        self._launcher = find_launcher() if starting is None else starting.launcher
        self._orphaned: float | None = None  # the time to end at

    # The main thread's

    def should_stop(self) -> bool:
        """Whether to stop here, before a step: all processes get the same answer at the same step."""
        stop = self._ticks.stop_here()
        self._since = time.monotonic()
        if stop:
            self.status = STOPPED[self._stopping]
        return stop

    def stop_for(self, error: UserError) -> None:
        """Stop the run for a fault that it can survive for a few steps; may be called from any thread.

        Raises:
            UserError: the same, where there is no control that could stop anything.
        """
        if not self._watching:
            raise error
        self._post({"say": "stop", "why": FAULT, "fault": [error.problem, error.fix]})

    def doing(self, what: str) -> None:
        """What the main thread does from now on, in words for the error message should it never end."""
        self._doing, self._since = what, time.monotonic()

    def __enter__(self) -> Control:
        self._wake, self._waker = wake_sockets()
        self._links = links = meet(self.world)
        if self.world.is_main:
            advice = "; resume with --resume auto" if self.folder else ""
            self._hub = Hub(links.peers, self._send, self.stall_timeout, state=self._state, advice=advice)
        self._heard = time.monotonic()
        if threading.current_thread() is threading.main_thread():
            listen(self._waker)
        if self._starting is not None:
            self._starting.hand_over()
        self._watching = True
        threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Say goodbye and wait until all have done so; on an error, end this process and with it the others."""
        if error is not None:
            self._fail(error)
        self.doing("waiting for the others to end")
        self._post({"say": "bye", "ticks": self._ticks.passed})
        self._left.wait()
        # All that is left is to exit. A signal that arrives now, such as the one that torchrun sends to the others once
        # the first has exited, must not change the exit status.
        if threading.current_thread() is threading.main_thread():
            signal.set_wakeup_fd(-1)
            for number in SIGNALS:
                signal.signal(number, signal.SIG_IGN)
        threading.Thread(target=_end_late, args=(self.status,), name="end", daemon=True).start()

    def _fail(self, error: BaseException) -> NoReturn:
        """Report it to the hub, whose answer ends the process; it may name another process's failure as the cause."""
        kind, text = _described(error)
        trace = "" if kind == "user" else farewell.format_trace(error)
        self._post({"say": "failed", "kind": kind, "text": text, "trace": trace})
        time.sleep(LEAVING)
        self._report(f"error: {text}", trace)  # the hub cannot be reached
        exit_now(USER_ERROR if kind == "user" else CRASHED)

    def _post(self, message: Message) -> None:
        self._out.put(message)
        with suppress(OSError):
            self._waker.send(b"\0")

    # The watch thread

    def _watch(self) -> None:
        try:
            beaten = looked = time.monotonic()
            while not self._left.is_set():
                sources: list[Any] = [self._wake, *self._links.ranks, *filter(None, [self._links.hub])]
                ready = wait(sources, timeout=self._beat / 2)
                now = time.monotonic()
                gap = now - looked - self._beat / 2
                if gap > 5:  # this process was suspended (Ctrl-Z), or the machine was: nobody has stalled
                    self._since, self._heard = self._since + gap, self._heard + gap
                    if self._hub is not None:
                        self._hub.forgive(gap)
                looked = now
                for source in ready:
                    (self._read_signals if source is self._wake else self._receive)(source, now)
                while not self._out.empty():
                    self._tell_hub(self._out.get())
                self._watch_parent(now)
                if now - beaten >= self._beat:
                    beaten = now
                    self._live(now)
                if self._hub is not None:
                    self._hub.look(now)
                while self._own:
                    self._obey(self._own.popleft())
        except BaseException as error:  # without this thread nothing could end the run
            self._report(
                "error: the control of the run failed, which is a bug; please report it", farewell.format_trace(error)
            )
            exit_now(CRASHED)

    def _receive(self, source: Any, now: float) -> None:
        try:
            message = json.loads(source.recv_bytes())
        except (EOFError, OSError):
            source.close()
            if source is self._links.hub:
                self._links.hub = None
                self._hub_is_lost("exited unexpectedly", RANK_LOST)
            elif self._hub is not None:
                self._hub.lost(self._links.ranks.pop(source), now)
            return
        if source is self._links.hub:
            self._heard = now
            self._obey(message)
        elif self._hub is not None:
            self._hub.hear(self._links.ranks[source], message, now)

    def _read_signals(self, wake: Any, now: float) -> None:
        with suppress(BlockingIOError):
            for number in wake.recv(1024):
                if number:
                    self._signal(signal.Signals(number), now)

    def _signal(self, number: signal.Signals, now: float) -> None:
        """The first one stops the run. Only a second Ctrl-C ends it at once, and torchrun passes that on as SIGTERM."""
        again = self._interrupted is not None and now - self._interrupted > TWICE
        if again and (number == signal.SIGINT or (number == signal.SIGTERM and blurs_signals(self._launcher))):
            self._tell_hub({"say": "force"})
        if number == signal.SIGINT and self._interrupted is None:
            self._interrupted = now
        if number in SIGNALS and not self._stopping:
            self._tell_hub({"say": "stop", "why": number.name})

    def _watch_parent(self, now: float) -> None:
        """When the launcher is killed, no process may be left behind."""
        if self._launcher is None or self._leaving:
            return
        if self._orphaned is None:
            if os.getppid() == self._launcher.pid:
                return
            if self._interrupted is not None and now - self._interrupted > TWICE:
                self._tell_hub({"say": "force"})
            self._orphaned = now + (ORPHANED_STOPPING if self._stopping else ORPHANED)
            # Rank 0 comes last, so that it does not take the others' exits for deaths.
            self._orphaned -= 0 if self.world.is_main else 0.5
            self._tell_hub({"say": "stop", "why": "launcher"})
        elif now > self._orphaned:
            if self.world.is_main:
                self._report(
                    f"error: {self._launcher.name} is gone and the step did not end in time to save the place; "
                    "resume from the last checkpoint"
                )
            exit_now(COME_AGAIN)

    def _live(self, now: float) -> None:
        self._tell_hub(_beat(self._ticks.passed, self.place(), self._doing, now - self._since))
        if self._hub is not None:
            for rank in self._links.ranks.values():
                self._links.send(rank, {"do": "ping"})
        elif now - self._heard > self.stall_timeout + 5 * self._beat:  # by now the hub would have ended the run
            state = self._state(self._links.peers[0])
            self._hub_is_lost(f"has not answered for {now - self._heard:.0f} s (--stall-timeout){state}", STALLED)

    def _tell_hub(self, message: Message) -> None:
        if self._leaving:  # unread messages would cost the answer to the goodbye, see let_others_read
            return
        self._leaving = message["say"] == "bye"
        if self._hub is not None:
            self._hub.hear(0, message, time.monotonic())
        else:
            self._links.tell_hub(message)

    def _send(self, rank: int, message: Message) -> None:
        """A message of the hub to a rank. Its own rank comes last, as the message may end the process."""
        if rank == 0:
            self._own.append(message)
        else:
            self._links.send(rank, message)

    def _obey(self, message: Message) -> None:
        order = message["do"]
        if order == "vote":
            self._stopping = message["why"]
            if self._stopping == FAULT:
                self.fault = UserError(*message["fault"])
            if self.world.is_main:
                self._answer(message["why"], message["by"])
            self._tell_hub({"say": "vote", "ticks": self._ticks.vote()})
        elif order == "stop":
            self._ticks.decide(message["ticks"])
        elif order == "leave":
            self._left.set()
        elif order == "end":
            self._end(message)

    def _answer(self, why: str, by: int) -> None:
        heard = f"{why} received" + (f" by rank {by}" if by else "")
        if self.fault is not None:
            heard = f"rank {by}: {self.fault.problem}"
        if why == "launcher" and self._launcher is not None:
            heard = f"{self._launcher.name} is gone"
        more = _ends_at_once(self._launcher) if why == "SIGINT" else ""
        # In a thread of its own: a blocked console must not hold up this one.
        threading.Thread(target=self.say, args=(f"{heard}: {self.promise}{more}",), daemon=True).start()

    # Ending

    def _hub_is_lost(self, what: str, status: int) -> None:
        if self._left.is_set() or (self._leaving and status != STALLED):
            self._left.set()
            return
        if self._orphaned is not None:
            exit_now(COME_AGAIN)
        first, here = self._links.peers[0], self._links.peers[self.world.rank]
        lock = first_on_host(self._links.token)
        here.place, here.doing = self.place(), self._doing
        message = hub_lost(first, here, what, status, "; resume with --resume auto" if self.folder else "")
        message["say"] = lock is not None
        self._end(message)

    def _end(self, message: Message) -> NoReturn:
        """Say why and end this process, waiting for nothing that may itself wait for another process or the device."""
        self._leaving = True
        goodbye = threading.Thread(target=self._say_farewell, args=(message,), daemon=True)
        goodbye.start()
        goodbye.join(FAREWELL)
        exit_now(message["status"])

    def _say_farewell(self, message: Message) -> None:
        me = self.world.rank
        if message.get("killer") == me:
            with suppress(OSError):
                os.kill(message["victim"], signal.SIGKILL)
        sentence = message["sentence"]
        if "stacks" in message and self.folder is not None:
            sentence += f"; the ranks' stacks are in {self.folder}/stall-rank*.txt"
        self._report(sentence, message.get("trace", ""), aloud=message.get("say", self.world.is_main))
        if "stacks" in message:
            farewell.dump_stacks(me, self.folder, to_console=me == message["stacks"])
        if message.get("say"):  # the lock that makes this the one to report it is held until the others know
            time.sleep(FAREWELL / 3)
        farewell.let_others_read(self._links.ranks, FAREWELL / 2)
        if self.world.device.type == "cuda":
            dist.abort()

    def _report(self, sentence: str, trace: str = "", *, aloud: bool = True) -> None:
        self.let_go()
        log = self.folder / "train.log" if self.folder is not None and self.world.is_main else None
        farewell.report(sentence, trace, log, aloud=aloud)

    def _state(self, peer: Peer) -> str:
        return farewell.state(peer, self._links.peers[self.world.rank].host)


def _described(error: BaseException) -> tuple[str, str]:
    """The kind of a failure, as the hub has it, and what it is, on one line."""
    error = unusable_package(error) or error
    text = " ".join(str(error).split())
    if isinstance(error, UserError):
        return "user", text
    kind = "collective" if farewell.is_collective(error) else "crash"
    return kind, f"{type(error).__name__}{text and ': '}{text[:300]}"


def _beat(ticks: int, place: str, doing: str, idle: float) -> Message:
    """A sign of life: where the main thread is, and for how long."""
    line = farewell.line_of_main_thread()
    return {"say": "beat", "ticks": ticks, "place": place, "doing": doing, "idle": idle, "line": line}


def _ends_at_once(launcher: Launcher | None) -> str:
    """What a second Ctrl-C does, to follow what the first one does."""
    again = "Ctrl-C again" + (", or any other signal to torchrun," if blurs_signals(launcher) else "")
    return f"; {again} ends it at once"


def _end_late(status: int) -> None:
    backstop(LEAVING + 1)
    time.sleep(LEAVING)
    exit_now(status)
