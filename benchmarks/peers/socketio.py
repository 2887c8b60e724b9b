"""Engine.IO 4 and Socket.IO 5 over a WebSocket, as far as a room needs them. For both of their servers."""

from __future__ import annotations

import json

from benchmarks.audience import Failure
from benchmarks.peers.http import Line
from chatd.core.protocol import text_frame

PATH = "/socket.io/?EIO=4&transport=websocket"


def enter(line: Line, path: str = PATH) -> None:
    """Connected: `0{…}` opens the transport, `40` the namespace, and `40{…}` answers."""
    line.upgrade(path)
    if not line.frame().startswith(b"0"):
        raise Failure("there was no Engine.IO handshake")
    line.send(b"40")
    if not line.frame().startswith(b"40"):
        raise Failure("there was no Socket.IO handshake")


def greeted(line: Line) -> None:
    enter(line)
    if line.frame() != b'42["hi"]':
        raise Failure("there was no greeting")


def event(name: str, payload: bytes) -> bytes:
    """`42["m","…"]`, as both implementations write it."""
    return b"42" + json.dumps([name, payload.decode()], separators=(",", ":")).encode()


def frame(payload: bytes) -> bytes:
    return text_frame(event("m", payload))
