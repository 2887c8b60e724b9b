"""G: ten thousand clients in rooms of two, and messages of theirs, one after the other, at a steady rate."""

from __future__ import annotations

import random
import re
import select
import socket
import time

from benchmarks import wire
from benchmarks.audience import SOURCES, Failure
from benchmarks.daemons import SECRET, Pinned, tell
from benchmarks.results import Results
from chatd.auth.tokens import Tokens
from chatd.core.protocol import event

ROOM_SIZE = 2
TICK = 0.01  # seconds between two handfuls of messages
PATIENCE = 10.0  # seconds for what is still on its way at the end
_MESSAGE, _OK = re.compile(rb'\{"event":"message",'), re.compile(rb'\{"event":"ok",')
LOAD = "share of one core"


class Rooms:
    def __init__(self, node: Pinned, clients: int) -> None:
        self._node = node
        self._ready = select.epoll()
        self._clients: list[socket.socket] = []
        self._by_number: dict[int, socket.socket] = {}
        self._sent = self._heard = self._acknowledged = 0
        tokens = Tokens(SECRET)
        for number in range(clients):
            source = (f"127.0.0.{2 + number % SOURCES}", 0)
            one = socket.create_connection(("127.0.0.1", node.hub_port), 10, source)
            self._clients.append(one)
            wire.log_in(one, 1 + number // ROOM_SIZE, tokens.issue(number + 1, 24 * 3600))
            self._by_number[one.fileno()] = one
            self._ready.register(one, select.EPOLLIN)
            if number % 500 == 0:
                tell(f"small rooms: {number:,} clients are there")

    def close(self) -> None:
        for one in self._clients:
            one.close()
        self._ready.close()

    def load(self, rate: int, seconds: float) -> float:
        """CPU seconds of chatd for each second. Raises Failure if a message was lost or came twice."""
        began, cpu = time.monotonic(), self._node.cpu()
        for tick in range(round(seconds / TICK)):
            until = began + (tick + 1) * TICK
            self._send(round(rate * (tick + 1) * TICK) - round(rate * tick * TICK))
            while (left := until - time.monotonic()) > 0:
                self._read(left)
        used, elapsed = self._node.cpu() - cpu, time.monotonic() - began
        deadline = time.monotonic() + PATIENCE
        while self._heard < ROOM_SIZE * self._sent or self._acknowledged < self._sent:
            self._read(0.1)
            if time.monotonic() > deadline:
                break
        if (self._acknowledged, self._heard) != (self._sent, ROOM_SIZE * self._sent):
            raise Failure(
                f"of {self._sent} messages {self._acknowledged} were acknowledged, {self._heard} heard"
            )
        return used / elapsed

    def _send(self, count: int) -> None:
        for _ in range(count):
            number = random.randrange(len(self._clients))
            self._sent += 1
            room = 1 + number // ROOM_SIZE
            text = event("send", ref=self._sent, conversation_id=room, content="x" * 60)
            self._clients[number].sendall(wire.masked(text))

    def _read(self, seconds: float) -> None:
        for descriptor, _ in self._ready.poll(seconds):
            data = self._by_number[descriptor].recv(65536)
            self._heard += len(_MESSAGE.findall(data))
            self._acknowledged += len(_OK.findall(data))


def measure(results: Results, node: Pinned, *, clients: int, rate: int, seconds: float, rounds: int) -> None:
    rooms = Rooms(node, clients)
    try:
        for number in range(rounds):
            tell(f"small rooms: {rate:,} messages a second, round {number + 1} of {rounds}")
            share = rooms.load(rate, seconds)
            results.add("G", LOAD, f"{clients:,} clients, {rate:,} messages/s", "%", share * 100)
    finally:
        rooms.close()
