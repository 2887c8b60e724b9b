"""F: from the moment a post was due to each delivery, in a room of a hundred, on one node and through Redis."""

from __future__ import annotations

import re
import select
import socket
import threading
import time

from benchmarks import wire
from benchmarks.audience import Failure
from benchmarks.daemons import SECRET, Pinned, percentile, tell
from benchmarks.results import Results
from chatd.auth.tokens import Tokens
from tests.daemon import TOKEN

LISTENERS = 100
POST_RATE = 200  # a second
POSTERS = 4  # connections
ROOM = 7
PATIENCE = 10.0  # seconds for what is still on its way at the end
_NUMBER = re.compile(rb'"content":"(\d+) ')

P50, P99 = "delay, p50", "delay, p99"


class Delay:
    """Posts to one node, listens at the same or at another."""

    def __init__(self, post_to: Pinned, listen_to: Pinned, seconds: float) -> None:
        self._post_to, self._listen_to = post_to, listen_to
        self._count = round(POST_RATE * seconds)
        self._failure: BaseException | None = None

    def measure(self) -> list[float]:
        """Seconds, one of each delivery."""
        tokens = Tokens(SECRET)
        listeners = [self._listener(tokens.issue(number + 1, 3600)) for number in range(LISTENERS)]
        try:
            start = time.monotonic() + 0.2
            posters = [
                threading.Thread(target=self._post, args=(start, number), daemon=True)
                for number in range(POSTERS)
            ]
            for poster in posters:
                poster.start()
            found = self._listen(listeners, start)
            for poster in posters:
                poster.join()
        finally:
            for one in listeners:
                one.close()
        return found

    def _listener(self, token: str) -> socket.socket:
        one = socket.create_connection(("127.0.0.1", self._listen_to.hub_port))
        wire.log_in(one, ROOM, token)
        return one

    def _post(self, start: float, number: int) -> None:
        """Every so many-th, when it is due."""
        try:
            with socket.create_connection(("127.0.0.1", self._post_to.api_port)) as one:
                for n in range(number, self._count, POSTERS):
                    time.sleep(max(0.0, start + n / POST_RATE - time.monotonic()))
                    one.sendall(_request(n))
                    answer = one.recv(4096)
                    while not answer.endswith(b"}\n"):
                        answer += one.recv(4096)
                    if not answer.startswith(b"HTTP/1.1 200"):
                        raise Failure(f"a post was answered with {answer[:200]!r}")
        except BaseException as error:
            self._failure = error

    def _listen(self, listeners: list[socket.socket], start: float) -> list[float]:
        by_number = {one.fileno(): one for one in listeners}
        ready = select.epoll()
        for descriptor in by_number:
            ready.register(descriptor, select.EPOLLIN)
        due = [start + n / POST_RATE for n in range(self._count)]
        found: list[float] = []
        deadline = due[-1] + PATIENCE
        while len(found) < self._count * LISTENERS:
            if self._failure is not None:
                raise Failure(f"posting failed: {self._failure}") from self._failure
            if time.monotonic() > deadline:
                raise Failure(f"{self._count * LISTENERS - len(found)} deliveries did not come")
            for descriptor, _ in ready.poll(0.1):
                data, now = by_number[descriptor].recv(65536), time.monotonic()
                found += [now - due[int(n)] for n in _NUMBER.findall(data)]
        return found


def _request(number: int) -> bytes:
    body = b'{"conversation_id":%d,"sender_id":1,"content":"%d %s"}' % (ROOM, number, b"x" * 60)
    head = (
        f"POST /api/ws/messages HTTP/1.1\r\nHost: x\r\nX-Internal-Token: {TOKEN}\r\nContent-Length: {len(body)}"
    )
    return head.encode() + b"\r\n\r\n" + body


def measure(results: Results, name: str, post_to: Pinned, listen_to: Pinned, seconds: float) -> None:
    tell(f"delay: {name}")
    found = Delay(post_to, listen_to, seconds).measure()
    results.add("F", P50, name, "ms", percentile(found, 0.50) * 1e3)
    results.add("F", P99, name, "ms", percentile(found, 0.99) * 1e3)
