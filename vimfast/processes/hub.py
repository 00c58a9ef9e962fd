"""What the processes of a run decide together, without a collective: when to stop, and whether and why to end.

Nothing here reads a clock, a socket or a file: messages and the time go in, and messages come out, which
``vimfast.processes.control`` delivers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from vimfast.errors import UserError

Message = dict[str, Any]  # what JSON can hold

# Exit statuses of a run, listed in docs/stopping.md.
CRASHED, USER_ERROR, RANK_LOST, STALLED, COME_AGAIN = 1, 2, 3, 4, 75
FAULT = "fault"  # of a process, which stops the run as a signal does and then ends it as bad input
STOPPED = {
    "SIGINT": 130,
    "SIGTERM": 143,
    "SIGUSR1": COME_AGAIN,
    "SIGHUP": COME_AGAIN,
    "launcher": COME_AGAIN,
    FAULT: USER_ERROR,
}

# Failures come in groups: when one process dies, the collectives of the others fail a moment later, or even before its
# death is noticed. Seconds to wait for the cause before a consequence is reported.
GRACE = 1.0
GRACE_LOST = 0.3  # a death is a cause; this is for others that died with it

# Where a main thread waits for others, or for its device.
COLLECTIVE = ("/torch/", *(f"vimfast/train/{name}.py:" for name in ("gradients", "step", "sums")))

BEFORE_FIRST_STEP = "stopped before the first step; there is nothing to save"

START = 300.0  # seconds allowed for anything before the first step, even if --stall-timeout is shorter


class Ticks:
    """One process's side of the vote on where to stop.

    The main threads of all processes pass the same sequence of ticks, one before each step. A vote asks every process
    how many it has passed, and no process passes another tick until the result is known: the largest count. The others
    continue until they have passed as many, so all stop before the same step.

    It cannot deadlock. The question goes to the watch thread, which never blocks, so every living process answers,
    whatever its main thread is waiting for. To get from its tick to the agreed one, a slower process needs only
    collectives that lie before the agreed tick; each other process has either passed that tick, and so has queued its
    part of them, or is slower itself and continues. A process that does not answer is dead or frozen, and the hub
    notices that.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._voting, self._target = False, -1
        self.passed = 0

    def stop_here(self) -> bool:
        """Whether to stop at this tick; if not, it is passed. Waits while a vote is in progress."""
        with self._changed:
            self._changed.wait_for(lambda: not self._voting)
            if 0 <= self._target <= self.passed:
                return True
            self.passed += 1
            return False

    def vote(self) -> int:
        """Ticks passed so far; no more are passed until :meth:`decide` is called."""
        with self._changed:
            self._voting = True
            return self.passed

    def decide(self, target: int) -> None:
        with self._changed:
            self._voting, self._target = False, target
            self._changed.notify_all()


@dataclass
class Peer:
    """What the hub knows about a process."""

    rank: int
    host: str
    pid: int
    heard: float = 0.0  # when it was last heard from
    ticks: int = 0
    place: str = ""  # in the run
    doing: str = "starting"
    idle: float = 0.0  # seconds since that changed, as of then
    line: str = ""  # of code that the main thread was at
    left: bool = False  # has said goodbye

    def __str__(self) -> str:
        return f"rank {self.rank} (pid {self.pid} on {self.host})"

    @property
    def where(self) -> str:
        return f"{self.place} ({self.doing})" if self.place else self.doing


def _innocence(peer: Peer) -> tuple[bool, bool, bool, float]:
    """Sort key for ranks that are stuck: those that say they wait for others, or are in a collective, come last."""
    waits = peer.doing.startswith("waiting for rank")
    return waits, any(place in peer.line for place in COLLECTIVE), peer.doing != "waiting for data", -peer.idle


class _Failure(NamedTuple):
    rank: int
    kind: str  # "user", "crash", "collective"
    text: str
    trace: str


class Hub:
    """Receives messages from all processes and tells them what to do. It runs on the watch thread of rank 0.

    Args:
        peers: the processes, by rank.
        send: delivers a message to a rank.
        stall_timeout: seconds without progress that count as a stall.
        state: describes the state of a silent process for the error message; empty if unknown.
        advice: how to continue, appended to the messages about deaths and stalls.
    """

    def __init__(
        self,
        peers: list[Peer],
        send: Callable[[int, Message], None],
        stall_timeout: float,
        *,
        state: Callable[[Peer], str] = lambda peer: "",
        advice: str = "",
    ) -> None:
        self.peers, self.advice = peers, advice
        self._send, self._stall_timeout, self._state = send, stall_timeout, state
        self._why = ""  # the run was told to stop
        self._fault: UserError | None = None  # for which it was
        self._votes: dict[int, int] = {}
        self._decided = False
        self._failures: list[_Failure] = []
        self._lost: list[int] = []
        self._verdict_due: float | None = None
        self.ended = False  # the processes were told to end at once
        self.all_left = False

    def hear(self, rank: int, message: Message, now: float) -> None:
        peer, kind = self.peers[rank], message["say"]
        peer.heard = now
        if kind == "beat":
            peer.ticks, peer.place = message["ticks"], message["place"]
            peer.doing, peer.idle, peer.line = message["doing"], message["idle"], message["line"]
        elif kind == "stop":
            self._stop(rank, message)
        elif kind == "force":
            self._end(130, "interrupted again: ending at once; progress since the last checkpoint is lost")
        elif kind == "vote":
            peer.ticks = self._votes[rank] = message["ticks"]
            self._count()
        elif kind == "failed":
            self._failures.append(_Failure(rank, message["kind"], message["text"], message["trace"]))
            self._expect_verdict(now + GRACE)
        elif kind == "bye":
            peer.left, peer.ticks = True, message["ticks"]
            self._count()
            if all(p.left for p in self.peers):
                self.all_left = True
                self._tell_all({"do": "leave"})
        self._judge(now)

    def lost(self, rank: int, now: float) -> None:
        """The connection to a process is closed. That is a death unless the process has said why."""
        if not self.peers[rank].left and not any(f.rank == rank for f in self._failures):
            if self._why and not any(p.ticks for p in self.peers):  # the signal met it before it had a control
                self._end_before_first_step()
            self._lost.append(rank)
            self._expect_verdict(now + GRACE_LOST)
        self._judge(now)

    def look(self, now: float) -> None:
        """Check for an overdue verdict and for stalls. Called every second or so, after messages have been read."""
        self._judge(now)
        present = [p for p in self.peers if not p.left]
        if self.ended or not present or self._verdict_due is not None:
            return
        least = min(p.ticks for p in present)
        # In evaluation a process may be far ahead, and then waits for the others: only the slowest ones count.
        last = [p for p in present if p.ticks == least]
        limit = self._stall_timeout if least else max(self._stall_timeout, START)
        if all(p.idle + now - p.heard >= limit for p in last):
            self._report_stall(last, now)

    def forgive(self, seconds: float) -> None:
        """This process itself was suspended for so long: the others are not to blame for the silence."""
        for peer in self.peers:
            peer.heard += seconds

    def _tell_all(self, message: Message) -> None:
        for peer in self.peers:
            self._send(peer.rank, message)

    # Stopping

    def _stop(self, rank: int, message: Message) -> None:
        if self._why or self._verdict_due is not None:  # torchrun signals the others once one has failed
            return
        self._why = message["why"]
        if self._why == FAULT:
            self._fault = UserError(*message["fault"])
        self._tell_all({**message, "do": "vote", "by": rank})

    def _count(self) -> None:
        if not self._why or self._decided or any(not p.left and p.rank not in self._votes for p in self.peers):
            return
        self._decided = True
        target = max(p.ticks for p in self.peers)
        if target == 0 and not any(p.left for p in self.peers):  # still building or tuning
            self._end_before_first_step()
        else:
            self._tell_all({"do": "stop", "ticks": target})

    def _end_before_first_step(self) -> None:
        self._end(STOPPED[self._why], BEFORE_FIRST_STEP if self._fault is None else f"error: {self._fault}")

    # Ending

    def _expect_verdict(self, due: float) -> None:
        self._verdict_due = due if self._verdict_due is None else min(due, self._verdict_due)

    def _judge(self, now: float) -> None:
        if self.ended or self._verdict_due is None:
            return
        told = {f.rank for f in self._failures} | set(self._lost)
        if now < self._verdict_due and any(not p.left and p.rank not in told for p in self.peers):
            return
        if self._lost:
            first, *more = (self.peers[r] for r in self._lost)
            others = f" (so did ranks {', '.join(str(p.rank) for p in more)})" if more else ""
            self._end(
                RANK_LOST,
                f"error: {first} exited unexpectedly{others}, at {first.where}: "
                f"it crashed or was killed, perhaps because the host ran out of memory{self.advice}",
            )
            return
        # A user error is never the consequence of another failure; a crash may be.
        cause = min(self._failures, key=lambda f: (f.kind != "user", f.kind == "collective"))
        everywhere = any(f.rank == 0 and f.text == cause.text for f in self._failures)
        name = "" if everywhere else f"rank {cause.rank}: "
        status = USER_ERROR if cause.kind == "user" else CRASHED
        self._end(status, f"error: {name}{cause.text}", trace=cause.trace)

    def _report_stall(self, last: list[Peer], now: float) -> None:
        silent = max(last, key=lambda p: now - p.heard)
        answers = now - silent.heard <= self._stall_timeout / 2
        # Those that wait for another are not at fault; of the rest, the one that stopped first is.
        culprit = silent
        if answers:
            culprit = min(last, key=_innocence)
        state = f", in {culprit.line}" if answers else f" and does not answer{self._state(culprit)}"
        sentence = (
            f"error: no progress for {culprit.idle + now - culprit.heard:.0f} s (--stall-timeout): {culprit} "
            f"is stuck at {culprit.where}{state}{self.advice}"
        )
        # This very process is awake; one that has said goodbye no longer shows whether it is.
        awake = [p for p in self.peers if p.rank == 0 or (not p.left and now - p.heard <= self._stall_timeout / 2)]
        awake += [p for p in self.peers if p.left]
        neighbours = [p for p in awake if p.host == culprit.host and p is not culprit]
        self._end(
            STALLED,
            sentence,
            stacks=culprit.rank,
            # A frozen process cannot end itself; another one on its host kills it.
            killer=None if answers or not neighbours else neighbours[0].rank,
            victim=culprit.pid,
        )

    def _end(self, status: int, sentence: str, **more: Any) -> None:
        if not self.ended:
            self.ended = True
            self._tell_all({"do": "end", "status": status, "sentence": sentence, **more})


def hub_lost(first: Peer, here: Peer, what: str, status: int, advice: str) -> Message:
    """The end of a process that has lost rank 0 (`first`).

    Args:
        what: became of it.
        advice: to the user, from "; " on.
    """
    sentence = f"error: {first} {what}; rank {here.rank} was at {here.where}{advice}"
    message: Message = {"status": status, "sentence": sentence}
    if status == STALLED:
        message["stacks"] = 0
        if first.host == here.host:
            message |= {"killer": here.rank, "victim": first.pid}
    return message
