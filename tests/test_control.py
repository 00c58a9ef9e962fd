"""The vote and the hub without processes: many interleavings, and which rank is blamed for what."""

from __future__ import annotations

import random
import threading
import time
from typing import Any

import pytest

from vimfast.dist import World
from vimfast.processes.control import Control, _described
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
)
from vimfast.processes.meeting import Links


class Recorded:
    """A hub of that many ranks, and what it sends them."""

    def __init__(self, size: int, **settings: Any) -> None:
        self.messages: list[tuple[int, Message]] = []
        peers = [Peer(rank, "host" if rank < 2 else "other", 100 + rank) for rank in range(size)]
        self.hub = Hub(peers, lambda rank, message: self.messages.append((rank, message)), 10.0, **settings)

    def end(self) -> Message:
        """The one message that ends them all."""
        ends = [message for _, message in self.messages if message["do"] == "end"]
        assert len(ends) == len(self.hub.peers)
        assert all(end == ends[0] for end in ends)
        return ends[0]

    @property
    def ended(self) -> bool:
        return any(message["do"] == "end" for _, message in self.messages)


def beat(ticks: int, idle: float = 0.0, doing: str = "training step", line: str = "") -> Message:
    return {"say": "beat", "ticks": ticks, "place": f"step {ticks}", "doing": doing, "idle": idle, "line": line}


def failed(kind: str, text: str) -> Message:
    return {"say": "failed", "kind": kind, "text": text, "trace": f"trace of {text}"}


def test_a_missing_package_is_not_a_crash() -> None:
    """Training imports most of itself when its processes are connected. It ended in a traceback and status 1."""
    with pytest.raises(ModuleNotFoundError) as missing:
        import no_such_package  # noqa: F401
    sentence = "No module named 'no_such_package'; vimfast doctor says what is missing and how to install it"
    assert _described(missing.value) == ("user", sentence)
    with pytest.raises(ModuleNotFoundError) as bug:
        import vimfast.no_such_module  # noqa: F401
    assert _described(bug.value)[0] == "crash"


@pytest.mark.parametrize("seed", range(20))
def test_all_ranks_stop_at_the_same_tick(seed: int) -> None:
    """Threads for ranks, a barrier for each step's collective; messages are slow; one rank has long steps."""
    draw = random.Random(seed)
    size, length = draw.randint(2, 5), 60
    ranks = [Ticks() for _ in range(size)]
    meeting = threading.Barrier(size)
    free = draw.random() < 0.3  # as in evaluation: no collective holds the ranks together
    stopped: dict[int, int] = {}
    slow = draw.randrange(size)
    mail: list[tuple[int, Message]] = []
    hub = Hub([Peer(r, "host", r) for r in range(size)], lambda rank, message: mail.append((rank, message)), 1e9)

    def run(rank: int) -> None:
        for step in range(length):
            if ranks[rank].stop_here():
                stopped[rank] = step
                return
            time.sleep(0.004 if rank == slow else 0.001)
            if not free:
                meeting.wait(10)
        stopped[rank] = length

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    time.sleep(draw.uniform(0.01, 0.1))
    for rank in draw.sample(range(size), draw.randint(1, size)):  # one or more get the signal
        hub.hear(rank, {"say": "stop", "why": "SIGTERM"}, 0)
    while mail:
        rank, message = mail.pop(draw.randrange(len(mail)) if mail[0][1]["do"] == "vote" else 0)
        time.sleep(draw.uniform(0, 0.01))
        if message["do"] == "vote":
            hub.hear(rank, {"say": "vote", "ticks": ranks[rank].vote()}, 0)
        elif message["do"] == "stop":
            ranks[rank].decide(message["ticks"])
    for thread in threads:
        thread.join(10)
    assert len(stopped) == size
    assert len(set(stopped.values())) == 1


def test_a_run_stopped_before_its_first_step_ends_at_once() -> None:
    recorded = Recorded(2)
    recorded.hub.hear(1, {"say": "stop", "why": "SIGUSR1"}, 0)
    for rank in range(2):
        recorded.hub.hear(rank, {"say": "vote", "ticks": 0}, 0)
    assert recorded.end()["status"] == COME_AGAIN


def test_a_fault_before_the_first_step_is_the_error() -> None:
    """Only then: later all stop at the same place, save it and end with the error."""
    fault = {"say": "stop", "why": FAULT, "fault": ["image 7 is gone", "put it back"]}
    early, late = Recorded(2), Recorded(2)
    for recorded, ticks in ((early, 0), (late, 3)):
        recorded.hub.hear(1, fault, 0)
        for rank in range(2):
            assert (rank, {**fault, "do": "vote", "by": 1}) in recorded.messages
            recorded.hub.hear(rank, {"say": "vote", "ticks": ticks}, 0)
    assert early.end() == {"do": "end", "status": USER_ERROR, "sentence": "error: image 7 is gone; put it back"}
    assert (0, {"do": "stop", "ticks": 3}) in late.messages


def test_a_fault_is_the_error_of_a_run_that_loses_a_rank_before_its_first_step() -> None:
    recorded = Recorded(2)
    recorded.hub.hear(1, {"say": "stop", "why": FAULT, "fault": ["image 7 is gone", None]}, 0)
    recorded.hub.lost(1, 0)
    assert recorded.end() == {"do": "end", "status": USER_ERROR, "sentence": "error: image 7 is gone"}


def test_a_rank_that_has_said_goodbye_is_not_lost_and_counts_in_a_vote() -> None:
    recorded = Recorded(3)
    recorded.hub.hear(2, {"say": "bye", "ticks": 9}, 0)
    recorded.hub.lost(2, 1)
    recorded.hub.hear(0, {"say": "stop", "why": "SIGTERM"}, 2)
    for rank in (0, 1):
        recorded.hub.hear(rank, {"say": "vote", "ticks": 8}, 2)
    assert (0, {"do": "stop", "ticks": 9}) in recorded.messages
    for rank in (1, 0):
        assert not recorded.hub.all_left
        recorded.hub.hear(rank, {"say": "bye", "ticks": 9}, 3)
    assert recorded.hub.all_left
    recorded.hub.lost(1, 4)
    recorded.hub.look(1000)
    assert not recorded.ended
    assert [rank for rank, message in recorded.messages if message["do"] == "leave"] == [0, 1, 2]


def test_a_death_is_reported_before_the_errors_that_it_causes() -> None:
    recorded = Recorded(3)
    recorded.hub.hear(0, failed("collective", "RuntimeError: gloo"), 1.0)
    recorded.hub.hear(1, failed("crash", "RuntimeError: odd"), 1.1)
    recorded.hub.look(1.5)
    assert not recorded.ended
    recorded.hub.lost(2, 1.6)
    recorded.hub.lost(0, 1.7)  # it has said why, so this is not a death
    recorded.hub.look(2.5)
    assert recorded.end()["status"] == RANK_LOST
    assert recorded.end()["sentence"].startswith("error: rank 2 (pid 102 on other) exited unexpectedly, at starting")


@pytest.mark.parametrize(
    ("failures", "status", "sentence"),
    [
        ([(2, "user", "x is 1; it must be 2")], USER_ERROR, "error: rank 2: x is 1; it must be 2"),
        ([(1, "user", "x"), (0, "user", "x"), (2, "user", "x")], USER_ERROR, "error: x"),
        ([(1, "collective", "c"), (0, "crash", "b"), (2, "user", "x")], USER_ERROR, "error: rank 2: x"),
        ([(1, "collective", "c"), (2, "crash", "b")], CRASHED, "error: rank 2: b"),
        ([(1, "collective", "c")], CRASHED, "error: rank 1: c"),
    ],
)
def test_the_cause_is_reported(failures: list[tuple[int, str, str]], status: int, sentence: str) -> None:
    recorded = Recorded(3)
    for rank, kind, text in failures:
        recorded.hub.hear(rank, failed(kind, text), 1.0)
    assert recorded.ended == (len(failures) == 3)  # nobody is left to hear from
    recorded.hub.look(2.1)
    assert (recorded.end()["status"], recorded.end()["sentence"]) == (status, sentence)
    assert sentence.endswith(recorded.end()["trace"].removeprefix("trace of "))  # the cause's, sent with the sentence


def test_a_signal_after_a_failure_promises_nothing() -> None:
    """torchrun sends it to the others because one has failed."""
    recorded = Recorded(2)
    recorded.hub.hear(0, beat(5), 0)
    recorded.hub.lost(1, 1)
    recorded.hub.hear(0, {"say": "stop", "why": "SIGTERM"}, 1.1)
    assert not recorded.messages
    recorded.hub.look(2)
    assert recorded.end()["status"] == RANK_LOST


def test_a_rank_that_a_signal_ends_while_it_starts_is_not_lost() -> None:
    recorded = Recorded(2)
    recorded.hub.hear(0, {"say": "stop", "why": "SIGTERM"}, 0)
    recorded.hub.lost(1, 0)
    assert recorded.end()["status"] == STOPPED["SIGTERM"]


def test_a_rank_that_does_not_answer_is_the_one_to_blame() -> None:
    recorded = Recorded(2, state=lambda peer: " (frozen)", advice="; try again")
    for now in range(1, 15):
        recorded.hub.hear(0, beat(5, idle=now), now)
        if now < 3:
            recorded.hub.hear(1, beat(5, idle=0), now)
        recorded.hub.look(now)
    end = recorded.end()
    assert end["status"] == STALLED
    assert (
        "rank 1 (pid 101 on host) is stuck at step 5 (training step) and does not answer (frozen); try"
        in end["sentence"]
    )
    assert (end["killer"], end["victim"]) == (0, 101)


def test_a_rank_that_freezes_while_the_others_wait_for_its_goodbye_is_killed() -> None:
    recorded = Recorded(2)
    recorded.hub.hear(0, {"say": "bye", "ticks": 5}, 0)
    recorded.hub.hear(1, beat(5, doing="closing"), 0)
    recorded.hub.look(11)
    assert (recorded.end()["killer"], recorded.end()["victim"]) == (0, 101)


def test_the_first_rank_is_missed() -> None:
    control, ends = Control(World(rank=1, size=2)), []
    control._links = Links([Peer(0, "host", 100), Peer(1, "host", 101)], "none", None, {})
    control._end = ends.append  # type: ignore[method-assign, assignment]
    control._hub_is_lost("exited unexpectedly", RANK_LOST)
    assert ends[0]["sentence"] == "error: rank 0 (pid 100 on host) exited unexpectedly; rank 1 was at starting"
    control._leaving = True  # has said goodbye, and waits for the answer
    control._hub_is_lost("has not answered", STALLED)
    assert (ends[1]["killer"], ends[1]["victim"]) == (1, 100)
    control._hub_is_lost("exited unexpectedly", RANK_LOST)  # it ends as this one does
    assert len(ends) == 2


@pytest.mark.parametrize(
    ("beats", "culprit"),
    [
        ([beat(5, 11), beat(5, 11, "waiting for data")], 1),
        ([beat(7, 12), beat(5, 11)], 1),
        ([beat(5, 11, line="/x/torch/autograd.py:3"), beat(5, 10.5, line="/x/model.py:4")], 1),
        ([beat(5, 11, "saving"), beat(5, 12, "waiting for rank 0 to save")], 0),
    ],
)
def test_of_those_that_answer_the_one_that_waits_for_no_other_is_to_blame(beats: list[Message], culprit: int) -> None:
    recorded = Recorded(2)
    for rank, message in enumerate(beats):
        recorded.hub.hear(rank, message, 20)
    recorded.hub.look(20)
    assert recorded.end()["stacks"] == culprit


def test_a_rank_that_is_ahead_in_evaluation_has_not_stalled() -> None:
    recorded = Recorded(2)
    recorded.hub.hear(0, beat(50, 500), 20)
    recorded.hub.hear(1, beat(30, 1), 20)
    recorded.hub.look(20)
    recorded.hub.forgive(100)  # this machine was suspended
    recorded.hub.look(120)
    assert not recorded.ended


def test_a_control_that_is_not_entered_stops_nothing() -> None:
    control = Control(World())
    assert not any(control.should_stop() for _ in range(5))
    assert control.status == 0
