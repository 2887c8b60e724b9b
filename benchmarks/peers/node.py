"""The peers in JavaScript, with the machine's Node and npm."""

from __future__ import annotations

import json
import shutil
import socket
from contextlib import AbstractContextManager
from pathlib import Path

from benchmarks.peers import http, socketio
from benchmarks.peers.http import Line, WebSocketPublisher
from benchmarks.peers.peer import SERVERS, Peer, Unavailable, run

PACKAGE = Path(__file__).with_name("package.json")


class _Node(Peer):
    program: str

    def install(self, home: Path) -> None:
        if shutil.which("npm") is None:
            raise Unavailable("there is no npm here")
        node = home / "node"
        if (node / "package.json").exists() and (node / "package.json").read_text() == PACKAGE.read_text():
            return
        node.mkdir(parents=True, exist_ok=True)
        (node / "package.json").write_text(PACKAGE.read_text())
        run("npm", "install", "--no-audit", "--no-fund", "--silent", cwd=node)

    def version(self, home: Path) -> str:
        installed = home / "node" / "node_modules" / self.name / "package.json"
        return f"{self.name} {json.loads(installed.read_text())['version']} on Node {run('node', '-v').strip()}"

    def command(self, home: Path, port: int, directory: Path) -> list[str]:
        program = (SERVERS / self.program).read_text()
        (directory / self.program).write_text(program)
        modules = directory / "node_modules"
        if not modules.exists():
            modules.symlink_to((home / "node" / "node_modules").absolute())
        return ["node", str(directory / self.program), str(port)]


class Ws(_Node):
    name, program = "ws", "with_ws.js"

    def subscribe(self, one: socket.socket) -> None:
        line = Line(one)
        http.greeted(line, "/sub")
        line.finish()

    def frame(self, payload: bytes) -> bytes:
        return http.plain_frame(payload)

    def publisher(self, port: int) -> AbstractContextManager[WebSocketPublisher]:
        return http.publisher(port, lambda line: line.upgrade("/pub"), bytes)


class SocketIo(_Node):
    name, program = "socket.io", "with_socket_io.js"

    def subscribe(self, one: socket.socket) -> None:
        line = Line(one)
        socketio.greeted(line)
        line.finish()

    def frame(self, payload: bytes) -> bytes:
        return socketio.frame(payload)

    def publisher(self, port: int) -> AbstractContextManager[WebSocketPublisher]:
        enter = lambda line: socketio.enter(line, f"{socketio.PATH}&pub=1")  # noqa: E731
        return http.publisher(port, enter, lambda payload: socketio.event("pub", payload))
