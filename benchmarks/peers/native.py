"""The peers from Debian: nginx with Nchan, and nats-server, which is spoken to in its own protocol."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from benchmarks.audience import Failure
from benchmarks.peers import http
from benchmarks.peers.http import Line
from benchmarks.peers.peer import Peer, Unavailable, run

INSTALL = Path("tests/install.sh")  # Debian packages, without starting their services
NCHAN_MODULE = Path("/usr/lib/nginx/modules/ngx_nchan_module.so")
OPEN_FILES = 15_000

_NGINX = """
load_module {module};
daemon off;
worker_processes 1;
worker_rlimit_nofile {files};
pid {directory}/pid;
error_log stderr error;
{user}
events {{ worker_connections {files}; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    keepalive_requests 1000000;
    nchan_max_reserved_memory 256M;
    server {{
        listen 127.0.0.1:{port} backlog=4096;
        location = /sub {{
            nchan_subscriber websocket;
            nchan_channel_id room;
            nchan_subscriber_first_message newest;
        }}
        location = /pub {{
            nchan_publisher http;
            nchan_channel_id room;
            nchan_message_buffer_length 1000;
            nchan_message_timeout 1m;
        }}
    }}
}}
"""
_NATS = """
listen: "127.0.0.1:{port}"
max_connections: {files}
ping_interval: "1h"
"""


class Nchan(Peer):
    name = "Nchan"

    def install(self, home: Path) -> None:
        if not NCHAN_MODULE.exists() or shutil.which("nginx") is None:
            run("sh", str(INSTALL), "nginx-light", "libnginx-mod-nchan")
        if not NCHAN_MODULE.exists():
            raise Unavailable(f"there is no {NCHAN_MODULE} after the installation")

    def version(self, home: Path) -> str:
        nginx = run("nginx", "-v").strip().rpartition("/")[2]
        return f"Nchan {_debian('libnginx-mod-nchan')} in nginx {nginx}"

    def command(self, home: Path, port: int, directory: Path) -> list[str]:
        user = "user root;" if os.getuid() == 0 else ""  # the worker reads files of this run
        values = {"module": NCHAN_MODULE, "directory": directory, "port": port, "user": user}
        (directory / "nginx.conf").write_text(_NGINX.format(files=OPEN_FILES, **values))
        return ["nginx", "-p", str(directory), "-e", "stderr", "-c", str(directory / "nginx.conf")]

    def subscribe(self, one: socket.socket) -> None:
        line = Line(one)
        line.upgrade("/sub")
        line.finish()

    def frame(self, payload: bytes) -> bytes:
        return http.plain_frame(payload)

    def publisher(self, port: int) -> AbstractContextManager[NchanPublisher]:
        return _publisher(port)


class NchanPublisher:
    """POSTs one after the other down one connection, their answers read at the end."""

    def __init__(self, one: socket.socket) -> None:
        self._socket, self._line = one, Line(one)

    def publish(self, payloads: Sequence[bytes]) -> None:
        head = b"POST /pub HTTP/1.1\r\nHost: x\r\nContent-Type: text/plain\r\nContent-Length: %d\r\n\r\n%b"
        self._socket.sendall(b"".join(head % (len(payload), payload) for payload in payloads))
        for _ in payloads:
            answer = self._line.until(b"\r\n\r\n")
            if not answer.startswith((b"HTTP/1.1 201", b"HTTP/1.1 202")):
                raise Failure(f"Nchan answered a post with {answer[:60]!r}")
            size = re.search(rb"content-length: (\d+)", answer, re.IGNORECASE)
            self._line.skip(int(size[1]) if size else 0)


@contextmanager
def _publisher(port: int) -> Iterator[NchanPublisher]:
    with socket.create_connection(("127.0.0.1", port), 10) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield NchanPublisher(one)


class Nats(Peer):
    name = "nats-server"

    def install(self, home: Path) -> None:
        if shutil.which("nats-server") is None:
            run("sh", str(INSTALL), "nats-server")

    def version(self, home: Path) -> str:
        return f"nats-server {run('nats-server', '--version').strip().rpartition(' ')[2].lstrip('v')}"

    def command(self, home: Path, port: int, directory: Path) -> list[str]:
        (directory / "nats.conf").write_text(_NATS.format(port=port, files=OPEN_FILES))
        return ["nats-server", "--config", str(directory / "nats.conf")]

    def subscribe(self, one: socket.socket) -> None:
        line = Line(one)
        line.until(b"\r\n")  # INFO
        one.sendall(b'CONNECT {"verbose":false,"pedantic":false}\r\nSUB room 1\r\nPING\r\n')
        line.until(b"PONG\r\n")
        line.finish()

    def frame(self, payload: bytes) -> bytes:
        return b"MSG room 1 %d\r\n%b\r\n" % (len(payload), payload)

    def publisher(self, port: int) -> AbstractContextManager[NatsPublisher]:
        return _nats_publisher(port)


class NatsPublisher:
    def __init__(self, one: socket.socket) -> None:
        self._socket = one

    def publish(self, payloads: Sequence[bytes]) -> None:
        self._socket.sendall(b"".join(b"PUB room %d\r\n%b\r\n" % (len(p), p) for p in payloads))


@contextmanager
def _nats_publisher(port: int) -> Iterator[NatsPublisher]:
    with socket.create_connection(("127.0.0.1", port), 10) as one:
        one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        line = Line(one)
        line.until(b"\r\n")
        one.sendall(b'CONNECT {"verbose":false,"pedantic":false}\r\nPING\r\n')
        line.until(b"PONG\r\n")
        yield NatsPublisher(one)


def _debian(package: str) -> str:
    return (
        run("dpkg-query", "--show", "--showformat", "${Version}", package).rpartition(":")[2].partition("+")[0]
    )
