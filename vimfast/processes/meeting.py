"""How the processes of a run are connected: rank 0 with each of the others, for those who know the run's key."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import secrets
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from vimfast import dist
from vimfast.dist import World
from vimfast.errors import UserError
from vimfast.processes.hub import Message, Peer

CONNECTING = 60.0  # seconds


@dataclass
class Links:
    """This process's connections. A broken one is noticed where it is read."""

    peers: list[Peer]
    token: str  # of the run
    hub: Connection | None  # from the others to rank 0
    ranks: dict[Connection, int]  # rank 0's, to the others

    def send(self, rank: int, message: Message) -> None:
        """From rank 0."""
        for connection, other in self.ranks.items():
            if other == rank:
                with suppress(OSError):
                    connection.send_bytes(json.dumps(message).encode())

    def tell_hub(self, message: Message) -> None:
        """From the others."""
        if self.hub is not None:
            with suppress(OSError):
                self.hub.send_bytes(json.dumps(message).encode())


def meet(world: World) -> Links:
    """Connect every process to rank 0. Addresses and the key are exchanged through the process group, once."""
    me: dict[str, Any] = {"host": socket.gethostname(), "pid": os.getpid()}
    server = None
    if world.is_main and world.size > 1:
        server, me["key"] = _listen(world.local_size < world.size), secrets.token_hex(32)
        me["port"] = server.getsockname()[1]
    all_of_them = dist.gather_objects(me)
    now = time.monotonic()
    peers = [Peer(rank, who["host"], who["pid"], heard=now) for rank, who in enumerate(all_of_them)]
    first = all_of_them[0]
    token = hashlib.sha256(first.get("key", str(os.getpid())).encode()).hexdigest()[:16]
    links = Links(peers, token, None, {})
    if server is not None:
        with server:
            links.ranks = _accept(server, world.size - 1, bytes.fromhex(me["key"]))
    elif not world.is_main:
        host = "localhost" if world.local_size == world.size else os.environ["MASTER_ADDR"]
        links.hub = _connect((host, first["port"]), world.rank, bytes.fromhex(first["key"]))
    return links


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
