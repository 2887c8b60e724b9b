"""The servers that chatd is measured against: each lets clients into one room, and delivers what is published.

peer       what a peer is to the benchmarks
http       a WebSocket client's words over a blocking socket
python     websockets, picows, python-socketio, Django Channels
node       ws, socket.io
native     Nchan, nats-server
servers/   the programs themselves, as their documentation would write them
"""

from __future__ import annotations

from benchmarks.peers.native import Nats, Nchan
from benchmarks.peers.node import SocketIo, Ws
from benchmarks.peers.peer import Peer, Unavailable
from benchmarks.peers.python import Channels, Picows, PythonSocketIo, Websockets

PEERS: dict[str, Peer] = {
    "websockets": Websockets(),
    "picows": Picows(),
    "python-socketio": PythonSocketIo(),
    "channels": Channels(),
    "ws": Ws(),
    "socket.io": SocketIo(),
    "nchan": Nchan(),
    "nats": Nats(),
}

__all__ = ["PEERS", "Peer", "Unavailable"]
