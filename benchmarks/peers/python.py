"""The peers in Python, in a virtual environment of their own with the interpreter that runs the benchmarks."""

from __future__ import annotations

import socket
import sys
import tempfile
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path

from benchmarks.peers import http, socketio
from benchmarks.peers.http import Line, WebSocketPublisher
from benchmarks.peers.peer import SERVERS, Peer, run
from tests.services import RedisServer

REQUIREMENTS = Path(__file__).with_name("requirements.txt")


class _Python(Peer):
    program: str
    packages: tuple[str, ...]

    def install(self, home: Path) -> None:
        stamp, wanted = home / "python" / "requirements.txt", REQUIREMENTS.read_text()
        if stamp.exists() and stamp.read_text() == wanted:
            return
        run(getattr(sys, "_base_executable", sys.executable), "-m", "venv", "--clear", str(home / "python"))
        run(str(_interpreter(home)), "-m", "pip", "install", "--quiet", "-r", str(REQUIREMENTS))
        stamp.write_text(wanted)

    def version(self, home: Path) -> str:
        code = "import sys; from importlib.metadata import version; print(*map(version, sys.argv[1:]))"
        found = run(str(_interpreter(home)), "-c", code, *self.packages).split()
        return ", ".join(f"{name} {version}" for name, version in zip(self.packages, found, strict=True))

    def command(self, home: Path, port: int, directory: Path) -> list[str]:
        return [str(_interpreter(home)), str(SERVERS / self.program), str(port)]

    def subscribe(self, one: socket.socket) -> None:
        line = Line(one)
        http.greeted(line, "/sub")
        line.finish()

    def frame(self, payload: bytes) -> bytes:
        return http.plain_frame(payload)

    def publisher(self, port: int) -> AbstractContextManager[WebSocketPublisher]:
        return http.publisher(port, lambda line: line.upgrade("/pub"), bytes)


class Websockets(_Python):
    name, program, packages = "websockets", "with_websockets.py", ("websockets",)


class Picows(_Python):
    name, program, packages = "picows", "with_picows.py", ("picows",)


class PythonSocketIo(_Python):
    name, program = "python-socketio", "with_python_socketio.py"
    packages = ("python-socketio", "uvicorn", "websockets", "uvloop")

    def subscribe(self, one: socket.socket) -> None:
        line = Line(one)
        socketio.greeted(line)
        line.finish()

    def frame(self, payload: bytes) -> bytes:
        return socketio.frame(payload)

    def publisher(self, port: int) -> AbstractContextManager[WebSocketPublisher]:
        enter = lambda line: socketio.enter(line, f"{socketio.PATH}&pub=1")  # noqa: E731
        return http.publisher(port, enter, lambda payload: socketio.event("pub", payload))


class Channels(_Python):
    name, program = "Django Channels", "with_channels.py"
    packages = ("channels", "channels-redis", "Django", "uvicorn")

    def helpers(self, stack: ExitStack) -> Mapping[str, str]:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="chatd-benchmark-"))
        return {"REDIS_URL": stack.enter_context(RedisServer(Path(directory), durable=False)).url}


def _interpreter(home: Path) -> Path:
    return home.absolute() / "python" / "bin" / "python"
