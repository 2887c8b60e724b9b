"""Listening sockets, opened before anything else so that a taken port is said in a sentence, or handed over.

And how many connections they may bring: a daemon whose clients hold every descriptor could neither serve its
backend nor reach its database.
"""

from __future__ import annotations

import errno
import os
import random
import resource
import select
import socket
from collections.abc import Callable

import trio

from chatd import systemd
from chatd.config import Config, split_bind
from chatd.errors import OperatorError
from chatd.lobby import Lobby

BACKLOG = 4096  # connections the kernel holds while a burst is accepted
USER_TIMEOUT = 20_000  # milliseconds until unread bytes to a vanished peer end its connection
# SO_SNDBUF in bytes; Linux doubles it, and so holds 180 KB at most for a client that does not read. By itself
# it takes 4 MB. TCP_NOTSENT_LOWAT bounds only what was not sent yet: for a client that had read fast and then
# stopped, the kernel still held 600 KB.
SEND_BUFFER = 64 * 1024

# What a socket that is handed over is called: FileDescriptorName= of its unit, or the unit's own name.
NAMES = {"api": "api", "chatd-api.socket": "api", "hub": "hub", "chatd.socket": "hub"}
# Without names the order tells: one is for the clients, which come from outside; two stand as in chatd.toml.
UNNAMED = {1: ["hub"], 2: ["api", "hub"]}

# Whether other processes accept from the same sockets. The kernel wakes all of them for each connection, and on
# an idle machine one may always be first: of 200 clients that came one by one, one of two had up to 185.
SHARED = "CHATD_WORKER_NUMBER" in os.environ
# So each lets a random while pass, a longer one the more clients it has; seconds.
PAUSE_LEAST, PAUSE_EACH, PAUSE_MOST = 0.002, 0.000_01, 0.02
IN_A_ROW = 16  # connections that are accepted without a pause where more wait than one: many come back at once

RESERVED = 256  # descriptors that are left to the API, the database and Redis, or
RESERVED_SHARE = 4  # a quarter of them, where there are few
LOOK = 0.05  # seconds between looks for a place, where there is none
RAISED_MOST = 1_048_576  # where the hard limit is none


class Gate(trio.abc.Listener[trio.SocketStream]):
    """A listener with room for so many connections. Beyond it the others wait in the kernel's backlog.

    `crowd` tells how many clients there are, so that of several workers the one with few is the first. In the
    `lobby` are those who make room for others.
    """

    def __init__(
        self,
        listener: trio.SocketListener,
        places: trio.Semaphore,
        crowd: Callable[[], int] = lambda: 0,
        lobby: Lobby | None = None,
    ) -> None:
        self._listener, self._places, self._crowd, self._lobby = listener, places, crowd, lobby
        self._in_a_row = IN_A_ROW

    async def accept(self) -> trio.SocketStream:
        """The caller gives the place back with `places.release()` when the connection has ended."""
        if self._lobby is not None:
            await self._make_room(self._lobby)
        await self._places.acquire()
        try:
            if SHARED:
                await self._wait_for_turn()
            return await self._listener.accept()
        except BaseException:
            self._places.release()
            raise

    async def _make_room(self, lobby: Lobby) -> None:
        """Where there is none for who comes next, one of those who say nothing goes."""
        while lobby.full or not self._places.value:
            await trio.lowlevel.wait_readable(self._listener.socket)
            if lobby.make_room():
                return
            await trio.sleep(LOOK)

    async def _wait_for_turn(self) -> None:
        while self._in_a_row >= IN_A_ROW or not somebody_waits(self._listener.socket):
            await trio.lowlevel.wait_readable(self._listener.socket)
            pause = min(PAUSE_LEAST + PAUSE_EACH * self._crowd(), PAUSE_MOST)
            await trio.sleep(random.uniform(0, pause))
            self._in_a_row = 0
        self._in_a_row += 1

    async def aclose(self) -> None:
        await self._listener.aclose()


def somebody_waits(listening: trio.socket.SocketType | socket.socket) -> bool:
    """Whether a connection is there to be accepted."""
    look = select.poll()
    look.register(listening.fileno(), select.POLLIN)
    return bool(look.poll(0))


def raise_descriptor_limit() -> int:
    """As many open files as the system allows this process; how many that are."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = RAISED_MOST if hard == resource.RLIM_INFINITY else hard
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most


def client_places(descriptors: int) -> int:
    """How many of so many open files may be connections of clients."""
    return descriptors - min(RESERVED, descriptors // RESERVED_SHARE)


def unknown_places(descriptors: int) -> int:
    """How many of them may be connections to the API that have not shown its token."""
    return max(1, min(RESERVED, descriptors // RESERVED_SHARE) // 2)


def address_of(listening: socket.socket) -> str:
    """`host:port`, as it is written in a bind."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_sockets(config: Config) -> tuple[socket.socket, list[socket.socket]]:
    """The socket of the API and those of the hub: handed over where they are, bound where not. All or none.

    Raises OperatorError.
    """
    opened: dict[str, list[socket.socket]] = {"api": [], "hub": []}
    try:
        for name, descriptor in _named(systemd.handed_over()):
            opened[name].append(_adopt(name, descriptor))
        for name, bind in (("api", config.api.bind), ("hub", config.hub.bind)):
            if not opened[name]:
                opened[name].append(open_socket(f"{name}.bind", bind))
        if len(opened["api"]) > 1:
            raise OperatorError("Two sockets are handed over as `api`: the API listens on one address.")
    except OperatorError:
        for one in opened["api"] + opened["hub"]:
            one.close()
        raise
    return opened["api"][0], opened["hub"]


def _named(handed_over: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The same with `api` and `hub` for names."""
    if all(name in ("", "unknown") for name, _ in handed_over) and len(handed_over) in UNNAMED:
        names = UNNAMED[len(handed_over)]
        return [(name, descriptor) for name, (_, descriptor) in zip(names, handed_over, strict=True)]
    for name, _ in handed_over:
        if name not in NAMES:
            raise OperatorError(
                f"A socket is handed over as {name!r}. Call it `hub` or `api`: FileDescriptorName= in its unit."
            )
    return [(NAMES[name], descriptor) for name, descriptor in handed_over]


def _adopt(name: str, descriptor: int) -> socket.socket:
    """A socket that somebody else has bound, with the options of our own."""
    wrong = (
        f"What is handed over as `{name}` is no listening TCP socket: write ListenStream=host:port in its unit."
    )
    try:
        os.set_inheritable(descriptor, False)
        adopted = socket.socket(fileno=descriptor)
    except OSError as error:
        raise OperatorError(wrong) from error
    # What else it could be: UDP, a path (its peers have no address), one connection (Accept=yes).
    is_tcp = adopted.family in (socket.AF_INET, socket.AF_INET6) and adopted.type == socket.SOCK_STREAM
    if not is_tcp or not adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        adopted.close()
        raise OperatorError(wrong)
    _bound_waiting(name, adopted)
    adopted.setblocking(False)
    return adopted


def _bound_waiting(name: str, listening: socket.socket) -> None:
    """For how long, and for how many bytes, a peer that reads nothing may wait: its connections inherit it."""
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)
    if name.startswith("hub"):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


def open_socket(key: str, bind: str) -> socket.socket:
    """A bound, listening socket for `host:port`; without a host for every address, IPv6 and IPv4.

    Raises OperatorError that names the key.
    """
    host, port = split_bind(bind)
    try:
        everywhere = not host and socket.has_dualstack_ipv6()
        family, _, _, _, address = socket.getaddrinfo(
            "::" if everywhere else host or "0.0.0.0", port, type=socket.SOCK_STREAM
        )[0]
        opened = socket.socket(family, socket.SOCK_STREAM)
        try:
            if everywhere:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            _bound_waiting(key, opened)
            opened.bind(address)
            opened.listen(BACKLOG)
            opened.setblocking(False)
        except OSError:
            opened.close()
            raise
    except (OSError, UnicodeError) as error:
        raise OperatorError(f"{key}: cannot listen on {bind}: {_advice(key, error)}") from error
    return opened


def _advice(key: str, error: OSError | UnicodeError) -> str:
    variable = f"CHATD_{key.replace('.', '__')}".upper()
    if isinstance(error, UnicodeError):
        return "this is no host name."
    if error.errno == errno.EADDRINUSE:
        return (
            f"another program has this port. Stop that one, or choose another: {variable}=127.0.0.1:18080, say."
        )
    if error.errno == errno.EACCES:
        return "ports below 1024 need a right that this user does not have. Choose a higher one."
    return f"{error.strerror or error}."
