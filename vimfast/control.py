"""The control of a run: signals, the vote on where to stop, and the end of all processes when one of them fails.

A watch thread in each process waits for signals and messages while the main thread trains; the one of rank 0 has the
hub (:class:`vimfast.hub.Hub`), which decides for all. All that this costs a training step is a lock: it involves no
collective and never waits for the device.
"""

from __future__ import annotations

import faulthandler
import hashlib
import hmac
import json
import os
import queue
import secrets
import signal
import socket
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, TextIO

from vimfast import dist
from vimfast.cli import backstop, exit_now, first_on_host
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.hub import COME_AGAIN, CRASHED, RANK_LOST, STALLED, STOPPED, USER_ERROR, Hub, Message, Peer, Ticks
from vimfast.starting import SIGNALS, Starting, listen, torchrun, wake_sockets

BEAT = 1.0  # seconds between two signs of life
TWICE = 1.0  # seconds within which the copies of one Ctrl-C arrive: the terminal sends one, torchrun another
LEAVING = 5.0  # seconds for everything after the last goodbye
FAREWELL = 3.0  # seconds to report an error in
CONNECTING = 60.0
TRACE = 20_000  # last characters of a traceback that are told
# Seconds to save the place in when torchrun is gone: the scheduler may be killing everything, or a second SIGTERM ended
# torchrun while its processes were still saving after the first.
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
        self,
        world: World,
        stall_timeout: float = 600.0,
        folder: Path | None = None,
        starting: Starting | None = None,
    ) -> None:
        self.world, self.stall_timeout, self.folder = world, stall_timeout, folder
        self.place: Callable[[], str] = lambda: ""  # in the run
        self.promise = "ending"  # what the run does when told to stop, for the answer to a signal
        self.say: Callable[[str], None] = lambda text: _print_at_once(f"{text}\n", sys.stdout)
        self.status = 0  # to exit with
        self._ticks = Ticks()
        self._doing, self._since = "starting", time.monotonic()
        self._beat = min(BEAT, stall_timeout / 6)
        self._leaving = False
        self._left = threading.Event()
        # The watch thread's own
        self._out: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._own: deque[Message] = deque()  # from the hub to its own rank
        self._hub: Hub | None = None
        self._hub_connection: Connection | None = None
        self._connections: dict[Connection, int] = {}  # the hub's, to the ranks
        self._heard = time.monotonic()  # the hub
        self._stopping = ""
        self._interrupted: float | None = None
        self._starting = starting
        self._parent = torchrun() if starting is None else starting.parent
        self._orphaned: float | None = None  # the time to end at

    # The main thread's

    def should_stop(self) -> bool:
        """Whether to stop here, before a step: all processes get the same answer at the same step."""
        stop = self._ticks.stop_here()
        self._since = time.monotonic()
        if stop:
            self.status = STOPPED[self._stopping]
        return stop

    def doing(self, what: str) -> None:
        """What the main thread does from now on, in words for the error message should it never end."""
        self._doing, self._since = what, time.monotonic()

    def __enter__(self) -> Control:
        self._wake, self._waker = wake_sockets()
        self._meet()
        if threading.current_thread() is threading.main_thread():
            listen(self._waker)
        if self._starting is not None:
            self._starting.hand_over()
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
        threading.Thread(target=self._end_late, name="end", daemon=True).start()

    def _end_late(self) -> None:
        backstop(LEAVING + 1)
        time.sleep(LEAVING)
        exit_now(self.status)

    def _fail(self, error: BaseException) -> NoReturn:
        """Report it to the hub, whose answer ends the process; it may name another process's failure as the cause."""
        text = " ".join(str(error).split())
        if isinstance(error, UserError):
            kind = "user"
        else:
            kind = "collective" if _is_collective(error) else "crash"
            text = f"{type(error).__name__}{text and ': '}{text[:300]}"
        trace = "" if kind == "user" else _trace(error)
        self._post({"say": "failed", "kind": kind, "text": text, "trace": trace})
        time.sleep(LEAVING)
        self._report(f"error: {text}", trace)  # the hub cannot be reached
        exit_now(USER_ERROR if kind == "user" else CRASHED)

    def _post(self, message: Message) -> None:
        self._out.put(message)
        with suppress(OSError):
            self._waker.send(b"\0")

    # Meeting

    def _meet(self) -> None:
        """Connect every process to rank 0. Addresses and the key are exchanged through the process group, once."""
        me: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
        server = None
        if self.world.is_main and self.world.size > 1:
            server, me["key"] = _listen(self.world.local_size < self.world.size), secrets.token_hex(32)
            me["port"] = server.getsockname()[1]
        all_of_them = dist.gather_objects(me)
        now = time.monotonic()
        self._peers = [Peer(rank, who["host"], who["pid"], heard=now) for rank, who in enumerate(all_of_them)]
        first = all_of_them[0]
        self._token = hashlib.sha256(first.get("key", str(os.getpid())).encode()).hexdigest()[:16]
        if self.world.is_main:
            if server is not None:
                with server:
                    self._connections = _accept(server, self.world.size - 1, bytes.fromhex(me["key"]))
            advice = "; resume with --resume auto" if self.folder else ""
            self._hub = Hub(self._peers, self._send, self.stall_timeout, state=self._state, advice=advice)
        else:
            one_host = self.world.local_size == self.world.size
            host = "localhost" if one_host else os.environ["MASTER_ADDR"]
            self._hub_connection = _connect((host, first["port"]), self.world.rank, bytes.fromhex(first["key"]))
        self._heard = time.monotonic()

    # The watch thread

    def _watch(self) -> None:
        try:
            beaten = looked = time.monotonic()
            while not self._left.is_set():
                sources: list[Any] = [self._wake, *self._connections]
                if self._hub_connection is not None:
                    sources.append(self._hub_connection)
                ready = wait(sources, timeout=self._beat / 2)
                now = time.monotonic()
                gap = now - looked - self._beat / 2
                if gap > 5:  # this process was suspended (Ctrl-Z), or the machine was: nobody has stalled
                    self._since, self._heard = self._since + gap, self._heard + gap
                    if self._hub is not None:
                        self._hub.forgive(gap)
                looked = now
                for source in ready:
                    self._receive(source, now)
                if self._wake in ready:
                    self._read_signals(now)
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
            self._report("error: the control of the run failed, which is a bug; please report it", _trace(error))
            exit_now(CRASHED)

    def _receive(self, source: Any, now: float) -> None:
        if source is self._wake:
            return
        try:
            message = json.loads(source.recv_bytes())
        except (EOFError, OSError):
            source.close()
            if source is self._hub_connection:
                self._hub_connection = None
                self._hub_is_lost("exited unexpectedly", RANK_LOST)
            elif self._hub is not None:
                self._hub.lost(self._connections.pop(source), now)
            return
        if source is self._hub_connection:
            self._heard = now
            self._obey(message)
        elif self._hub is not None:
            self._hub.hear(self._connections[source], message, now)

    def _read_signals(self, now: float) -> None:
        with suppress(BlockingIOError):
            for number in self._wake.recv(1024):
                if number:
                    self._signal(signal.Signals(number), now)

    def _signal(self, number: signal.Signals, now: float) -> None:
        """The first one stops the run. Only a second Ctrl-C ends it at once, and torchrun passes that on as SIGTERM."""
        again = self._interrupted is not None and now - self._interrupted > TWICE
        if again and (number == signal.SIGINT or (number == signal.SIGTERM and self._parent is not None)):
            self._force()
        if number == signal.SIGINT and self._interrupted is None:
            self._interrupted = now
        if number in SIGNALS and not self._stopping:
            self._tell_hub({"say": "stop", "why": number.name})

    def _force(self) -> None:
        self._tell_hub({"say": "force"})

    def _watch_parent(self, now: float) -> None:
        """When torchrun is killed, no process may be left behind."""
        if self._parent is None or self._leaving:
            return
        if self._orphaned is None:
            if os.getppid() == self._parent:
                return
            if self._interrupted is not None and now - self._interrupted > TWICE:
                self._force()
            self._orphaned = now + (ORPHANED_STOPPING if self._stopping else ORPHANED)
            # Rank 0 comes last, so that it does not take the others' exits for deaths.
            self._orphaned -= 0 if self.world.is_main else 0.5
            self._tell_hub({"say": "stop", "why": "torchrun"})
        elif now > self._orphaned:
            if self.world.is_main:
                self._report(
                    "error: torchrun is gone and the step did not end in time to save the place; "
                    "resume from the last checkpoint"
                )
            exit_now(COME_AGAIN)

    def _live(self, now: float) -> None:
        self._tell_hub(
            {
                "say": "beat",
                "ticks": self._ticks.passed,
                "place": self.place(),
                "doing": self._doing,
                "idle": now - self._since,
                "line": self._line(),
            }
        )
        if self._hub is not None:
            for connection in self._connections:
                with suppress(OSError):
                    connection.send_bytes(b'{"do": "ping"}')
        elif now - self._heard > self.stall_timeout + 5 * self._beat:  # by now the hub would have ended the run
            state = self._state(self._peers[0])
            self._hub_is_lost(f"has not answered for {now - self._heard:.0f} s (--stall-timeout){state}", STALLED)

    def _line(self) -> str:
        """The line of code that the main thread is at."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        return "" if frame is None else f"{frame.f_code.co_filename}:{frame.f_lineno}"

    def _tell_hub(self, message: Message) -> None:
        if self._leaving:  # unread messages would cost the answer to the goodbye, see _let_others_read
            return
        self._leaving = message["say"] == "bye"
        if self._hub is not None:
            self._hub.hear(0, message, time.monotonic())
        elif self._hub_connection is not None:
            with suppress(OSError):  # a broken connection is noticed where it is read
                self._hub_connection.send_bytes(json.dumps(message).encode())

    def _send(self, rank: int, message: Message) -> None:
        """A message of the hub to a rank. Its own rank comes last, as the message may end the process."""
        if rank == 0:
            self._own.append(message)
            return
        for connection, other in self._connections.items():
            if other == rank:
                with suppress(OSError):
                    connection.send_bytes(json.dumps(message).encode())

    def _obey(self, message: Message) -> None:
        order = message["do"]
        if order == "vote":
            self._stopping = message["why"]
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
        heard = "torchrun is gone" if why == "torchrun" else f"{why} received" + (f" by rank {by}" if by else "")
        again = "Ctrl-C again" + ("" if self._parent is None else ", or any other signal to torchrun,")
        more = f"; {again} ends it at once" if why == "SIGINT" else ""
        # In a thread of its own: a blocked console must not hold up this one.
        threading.Thread(target=self.say, args=(f"{heard}: {self.promise}{more}",), daemon=True).start()

    # Ending

    def _hub_is_lost(self, what: str, status: int) -> None:
        if self._left.is_set() or (self._leaving and status != STALLED):
            self._left.set()
            return
        if self._orphaned is not None:
            exit_now(COME_AGAIN)
        first, here = self._peers[0], self._peers[self.world.rank]
        lock = first_on_host(self._token)
        here.place, here.doing = self.place(), self._doing
        sentence = f"error: {first} {what}; rank {here.rank} was at {here.where}"
        sentence += "; resume with --resume auto" if self.folder else ""
        message: Message = {"status": status, "sentence": sentence, "say": lock is not None}
        if status == STALLED:
            message["stacks"] = 0
        if status == STALLED and first.host == here.host:
            message |= {"killer": self.world.rank, "victim": first.pid}
        self._end(message)

    def _end(self, message: Message) -> NoReturn:
        """Say why and end this process, waiting for nothing that may itself wait for another process or the device."""
        self._leaving = True
        farewell = threading.Thread(target=self._say_farewell, args=(message,), daemon=True)
        farewell.start()
        farewell.join(FAREWELL)
        exit_now(message["status"])

    def _say_farewell(self, message: Message) -> None:
        me = self.world.rank
        if message.get("killer") == me:
            with suppress(OSError):
                os.kill(message["victim"], signal.SIGKILL)
        sentence = message["sentence"]
        if "stacks" in message and self.folder is not None:
            sentence += f"; the ranks' stacks are in {self.folder}/stall-rank*.txt"
        if message.get("say", self.world.is_main):
            self._report(sentence, message.get("trace", ""))
        if "stacks" in message:
            self._dump_stacks(to_console=me == message["stacks"])
        if message.get("say"):  # the lock that makes this the one to report it is held until the others know
            time.sleep(FAREWELL / 3)
        self._let_others_read()
        if self.world.device.type == "cuda":
            dist.abort()

    def _dump_stacks(self, to_console: bool) -> None:
        with open(os.memfd_create("stacks"), "w+") as memory:
            faulthandler.dump_traceback(memory, all_threads=True)
            memory.seek(0)
            stacks = memory.read()
        if to_console:
            _print_at_once(f"stacks of rank {self.world.rank}:\n{stacks}")
        if self.folder is not None:
            with suppress(OSError):
                (self.folder / f"stall-rank{self.world.rank}.txt").write_text(stacks)

    def _let_others_read(self) -> None:
        """Closing a connection with unread input would discard what was last sent on it."""
        end = time.monotonic() + FAREWELL / 2
        while self._connections and time.monotonic() < end:
            for connection in wait(list(self._connections), timeout=end - time.monotonic()):
                try:
                    connection.recv_bytes()  # type: ignore[union-attr]
                except (EOFError, OSError):  # noqa: PERF203
                    del self._connections[connection]  # type: ignore[arg-type]

    def _report(self, sentence: str, trace: str = "") -> None:
        """To the console, after the traceback, and to the run's log; either may be broken by now."""
        _print_at_once(f"{trace}{sentence}\n")
        if self.folder is not None and self.folder.is_dir() and self.world.is_main:
            with suppress(OSError), open(self.folder / "train.log", "a") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {sentence}\n")

    def _state(self, peer: Peer) -> str:
        """Of a process that does not answer, if it is on this host."""
        if peer.host != self._peers[self.world.rank].host:
            return ""
        with suppress(OSError):
            for line in Path(f"/proc/{peer.pid}/status").read_text().splitlines():
                if line.startswith("State:"):
                    return f" (its process is in state {line.split(maxsplit=1)[1]})"
        return ""


def _print_at_once(text: str, stream: TextIO | None = sys.__stderr__) -> None:
    """Print to the console, if it is still there, in one write: lines of several processes must not mingle."""
    with suppress(OSError, ValueError):
        print(text, end="", file=stream, flush=True)


def _trace(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-TRACE:]


def _is_collective(error: BaseException) -> bool:
    """Whether an error only says that the processes have lost each other."""
    words = ("gloo", "nccl", "connection closed by peer", "connection reset", "process group", "processgroup")
    return isinstance(error, RuntimeError) and any(word in str(error).lower() for word in words)


def _listen(for_other_hosts: bool) -> socket.socket:
    if not for_other_hosts:
        return socket.create_server(("127.0.0.1", 0), backlog=256)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
    return socket.create_server(("", 0), backlog=4096)


def _accept(server: socket.socket, count: int, key: bytes) -> dict[Connection, int]:
    """A connection from each of `count` ranks that know the key; all others are closed."""
    end = time.monotonic() + CONNECTING
    found: dict[Connection, int] = {}
    while len(found) < count:
        server.settimeout(max(end - time.monotonic(), 0.01))
        try:
            called, _ = server.accept()
        except TimeoutError:
            missing = sorted(set(range(1, count + 1)) - set(found.values()))
            raise UserError(
                f"ranks {', '.join(map(str, missing))} did not reach rank 0 on port {server.getsockname()[1]} within "
                f"{CONNECTING:.0f} s; open the ports between the hosts"
            ) from None
        connection, nonce = _wrap(called), secrets.token_bytes(32)
        try:
            connection.send_bytes(nonce)
            rank = _check(connection.recv_bytes(256), nonce, key) if connection.poll(5) else None
        except (OSError, EOFError):
            rank = None
        if rank is None or rank in found.values():
            connection.close()
        else:
            found[connection] = rank
    return found


def _connect(address: tuple[str, int], rank: int, key: bytes) -> Connection:
    end = time.monotonic() + CONNECTING
    while True:
        try:
            connection = _wrap(socket.create_connection(address, timeout=5))
            if not connection.poll(CONNECTING):
                raise TimeoutError
            nonce = connection.recv_bytes(256)
            connection.send_bytes(f"{rank} ".encode() + _sign(nonce, rank, key))
            return connection
        except (OSError, EOFError) as error:  # noqa: PERF203
            if time.monotonic() > end:
                raise UserError(
                    f"rank {rank} could not reach rank 0 at {address[0]}, port {address[1]} ({error}); "
                    "open the ports between the hosts"
                ) from None
            time.sleep(0.2)


def _wrap(connected: socket.socket) -> Connection:
    connected.settimeout(None)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return Connection(connected.detach())


def _sign(nonce: bytes, rank: int, key: bytes) -> bytes:
    return hmac.new(key, nonce + str(rank).encode(), "sha256").hexdigest().encode()


def _check(answer: bytes, nonce: bytes, key: bytes) -> int | None:
    rank, _, signature = answer.partition(b" ")
    if not rank.isdigit() or not hmac.compare_digest(signature, _sign(nonce, int(rank), key)):
        return None
    return int(rank)
