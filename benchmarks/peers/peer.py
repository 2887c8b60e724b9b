"""What a peer is to the benchmarks: it installs itself, starts on a core, and speaks for its clients."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import IO, Protocol

START_SECONDS = 15.0
STOP_SECONDS = 5.0
SERVERS = Path(__file__).parent / "servers"


class Unavailable(Exception):
    """A sentence that says why a peer cannot run here."""


class Running:
    """A server's processes: it, and what it started."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def pids(self) -> list[int]:
        """All whose CPU and memory count."""
        return [self._process.pid, *_children(self._process.pid)]


class Publisher(Protocol):
    def publish(self, payloads: Sequence[bytes]) -> None:
        """Send them all at once, in this order."""


class Peer(ABC):
    """`name` is its row in the tables. `home` is where it is installed, and keeps what it needs."""

    name: str

    @abstractmethod
    def install(self, home: Path) -> None:
        """What is missing. Raises Unavailable."""

    @abstractmethod
    def version(self, home: Path) -> str: ...

    @abstractmethod
    def command(self, home: Path, port: int, directory: Path) -> list[str]:
        """What runs it on a port of 127.0.0.1; `directory` is for files of this run."""

    @abstractmethod
    def subscribe(self, one: socket.socket) -> None:
        """Bring a fresh connection into the room, leaving nothing unread."""

    @abstractmethod
    def frame(self, payload: bytes) -> bytes:
        """What a subscriber gets for this payload."""

    @abstractmethod
    def publisher(self, port: int) -> AbstractContextManager[Publisher]:
        """It is not in the room."""

    def helpers(self, stack: ExitStack) -> Mapping[str, str]:
        """Start what it needs beside it, which is not counted; returns environment variables."""
        return {}

    @contextmanager
    def start(self, home: Path, port: int, core: int) -> Iterator[Running]:
        """Pinned to a core, listening when the block begins. Raises Unavailable."""
        with ExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="chatd-benchmark-")))
            environ = os.environ | self.helpers(stack)
            output = stack.enter_context((directory / "output").open("w+b"))
            process = subprocess.Popen(
                ["taskset", "--cpu-list", str(core), *self.command(home, port, directory)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environ,
                start_new_session=True,
            )
            try:
                _wait_until_it_listens(process, port, output)
                yield Running(process)
            finally:
                _end(process)


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, output: IO[bytes]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    output.seek(0)
    raise Unavailable(f"it did not start: {output.read()[-400:].decode(errors='replace')}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """It and what it started, which share a session."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
            process.wait(STOP_SECONDS)
        except ProcessLookupError:
            break
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _children(pid: int) -> list[int]:
    try:
        found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [number for child in found for number in (int(child), *_children(int(child)))]


def run(*command: str, cwd: Path | None = None) -> str:
    """Its output. Raises Unavailable with the last of what it said."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from error
    if done.returncode:
        raise Unavailable(f"{' '.join(command[:4])} …: {(done.stderr or done.stdout).strip()[-300:]}")
    return done.stdout + done.stderr
