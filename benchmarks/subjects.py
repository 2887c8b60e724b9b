"""What is measured, all in one shape: a server that starts, lets clients in, and delivers what is published.

    Daemon      chatd as it is run: messages come over HTTP, and are committed
    Hub         chatd's hub and fanout alone, as if messages had just been committed
    Plain       trio-websocket without chatd, and the bare system call
    Foreign     the peers, see `peers`

The clients are in `audience`; `scenarios` brings the two together.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

import msgspec

from benchmarks import wire
from benchmarks.audience import Failure
from benchmarks.daemons import SECRET, Pinned, process_cpu
from benchmarks.peers.peer import Peer, Publisher, Running
from benchmarks.servers import ROOM, Command, Go, Prepare, messages
from chatd.auth.tokens import Tokens
from chatd.core.protocol import text_frame
from tests.daemon import TOKEN
from tests.services import free_port

SIZE = 200  # bytes of an event
CONTENT = "x" * 38  # which makes a flat message of about that size
TOKEN_SECONDS = 24 * 3600
END_SECONDS = 10.0
WITNESS_SECONDS = 60.0  # until the witness has what was published


class Service(ABC):
    """A server that runs, on `port`."""

    port: int

    @abstractmethod
    def pids(self) -> list[int]:
        """All processes whose CPU and memory count."""

    @abstractmethod
    def enter(self, one: socket.socket, number: int) -> None:
        """Bring a fresh connection into the room: when this returns, it gets what is published."""

    @abstractmethod
    def publish(self, count: int, pause: float) -> bytes:
        """Publish so many messages, back to back or one each `pause`; what each client must get for them."""

    def cpu(self) -> float:
        """Seconds that it has used."""
        return sum(process_cpu(pid) for pid in self.pids())

    def memory(self) -> int:
        """Bytes that it holds."""
        return sum(_resident(pid) for pid in self.pids())


class Subject(ABC):
    """`name` is its row in the tables."""

    name: str

    @abstractmethod
    def start(self, core: int) -> Any:
        """A context manager for a running Service, pinned to this core."""

    def version(self) -> str:
        return ""


class Daemon(Subject):
    """`settings` as for `tests.daemon.Daemon`."""

    def __init__(self, name: str = "chatd", **settings: Any) -> None:
        self.name, self._settings = name, settings

    @contextmanager
    def start(self, core: int) -> Iterator[Service]:
        with tempfile.TemporaryDirectory(prefix="chatd-benchmark-") as directory:
            settings = {"limits__handshakes_per_second": 0, "hub__ping_interval": 3600} | self._settings
            node = Pinned(Path(directory), core, **settings)
            try:
                node.start()
                with closing(_DaemonService(node)) as service:
                    yield service
            finally:
                node.close()


class _DaemonService(Service):
    """A witness in the room says which bytes each client must get: nobody can foretell a change's mark."""

    def __init__(self, node: Pinned) -> None:
        self.node, self.port = node, node.hub_port
        self._tokens = Tokens(SECRET)
        self._http = HTTPConnection("127.0.0.1", node.api_port)
        self._witness = socket.create_connection(("127.0.0.1", self.port), WITNESS_SECONDS)
        self.enter(self._witness, 0)
        self._seen = self._witness.makefile("rb")

    def close(self) -> None:
        self._seen.close()
        self._witness.close()
        self._http.close()

    def pids(self) -> list[int]:
        return [self.node.pid]

    def enter(self, one: socket.socket, number: int) -> None:
        wire.log_in(one, ROOM, self._tokens.issue(number + 1, TOKEN_SECONDS))

    def publish(self, count: int, pause: float) -> bytes:
        if not pause:
            return self._post_batch(count)
        began = time.monotonic()
        answers = []
        for number in range(count):
            time.sleep(max(0.0, began + number * pause - time.monotonic()))
            answers.append(self._post("/api/ws/messages", self._message()))
        return self._frames(answers)

    def _post_batch(self, count: int) -> bytes:
        answer = self._post("/api/ws/messages/batch", {"messages": [self._message()] * count})
        return self._frames(answer["results"])

    @staticmethod
    def _message() -> dict[str, Any]:
        return {"conversation_id": ROOM, "sender_id": 1, "content": CONTENT}

    def _frames(self, answers: Sequence[dict[str, Any]]) -> bytes:
        """As the witness got them. Raises Failure if they are not the answers' messages, in their order."""
        frames = []
        for answer in answers:
            text = wire.next_text(self._seen)
            found = json.loads(text)
            wanted = {"event": "message", "content": CONTENT} | {name: answer[name] for name in ("id", "seq")}
            if any(found.get(name) != value for name, value in wanted.items()):
                raise Failure(f"the witness got {found}, not {wanted}")
            frames.append(text_frame(text))
        return b"".join(frames)

    def _post(self, path: str, body: Any) -> Any:
        headers = {"X-Internal-Token": TOKEN, "Content-Type": "application/json"}
        self._http.request("POST", path, json.dumps(body), headers)
        answer = self._http.getresponse()
        found = json.loads(answer.read())
        if answer.status != 200:
            raise Failure(f"a post was answered with {answer.status}: {found}")
        return found


class OwnServer(Subject):
    """One of `servers`, told what to do over its standard input. `ways` are one by one, and joined."""

    def __init__(self, name: str, server: str, way: str, joined: str = "") -> None:
        self.name, self._server = name, server
        self._way, self._joined = way, joined or way

    @contextmanager
    def start(self, core: int) -> Iterator[Service]:
        command = [sys.executable, "-m", "benchmarks.servers", self._server, str(core)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        try:
            yield _OwnService(process, self._way, self._joined, logs_in=self._server == "chatd")
        finally:
            _end(process)


class _OwnService(Service):
    def __init__(self, process: subprocess.Popen[bytes], way: str, joined: str, *, logs_in: bool) -> None:
        self._process, self._way, self._joined = process, way, joined
        self._tokens = Tokens(SECRET) if logs_in else None
        self._seq = 0
        self.port = msgspec.json.decode(self._answer(), type=int)

    def pids(self) -> list[int]:
        return [self._process.pid]

    def enter(self, one: socket.socket, number: int) -> None:
        if self._tokens is None:
            wire.upgrade(one)
        else:
            wire.log_in(one, ROOM, self._tokens.issue(number + 1, TOKEN_SECONDS))

    def publish(self, count: int, pause: float) -> bytes:
        first, self._seq = self._seq + 1, self._seq + count
        self._tell(Prepare(first, count, SIZE))
        self._answer()
        self._tell(Go(self._way if pause else self._joined, pause))
        self._answer()
        return b"".join(text_frame(change.payload) for change in messages(first, count, SIZE))

    def _tell(self, command: Command) -> None:
        assert self._process.stdin
        self._process.stdin.write(msgspec.json.encode(command))
        self._process.stdin.flush()

    def _answer(self) -> bytes:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return line
        raise Failure(f"the server process ended with {self._process.wait()}")


class Foreign(Subject):
    """A peer, in its own words."""

    def __init__(self, peer: Peer, home: Path) -> None:
        self.name, self._peer, self._home = peer.name, peer, home

    @contextmanager
    def start(self, core: int) -> Iterator[Service]:
        port = free_port()
        with self._peer.start(self._home, port, core) as running, self._peer.publisher(port) as publisher:
            yield _ForeignService(self._peer, running, publisher, port)

    def version(self) -> str:
        return self._peer.version(self._home)


class _ForeignService(Service):
    def __init__(self, peer: Peer, running: Running, publisher: Publisher, port: int) -> None:
        self._peer, self._running, self._publisher, self.port = peer, running, publisher, port
        self._seq = 0

    def pids(self) -> list[int]:
        return self._running.pids()

    def enter(self, one: socket.socket, number: int) -> None:
        self._peer.subscribe(one)

    def publish(self, count: int, pause: float) -> bytes:
        first, self._seq = self._seq + 1, self._seq + count
        payloads = [change.payload for change in messages(first, count, SIZE)]
        if pause:
            began = time.monotonic()
            for number, payload in enumerate(payloads):
                time.sleep(max(0.0, began + number * pause - time.monotonic()))
                self._publisher.publish([payload])
        else:
            self._publisher.publish(payloads)
        return b"".join(map(self._peer.frame, payloads))


def allow_descriptors(needed: int) -> None:
    """For this process and those that it starts. Raises Failure."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise Failure(f"{needed:,} open files are needed and {hard:,} allowed (ulimit -Hn)")
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _resident(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _end(process: subprocess.Popen[bytes]) -> None:
    """It ends with its stdin, and says on stderr what was wrong, if anything was."""
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
