"""Listening sockets, opened before anything else so that a taken port is said in a sentence.

And how many connections they may bring: a daemon whose clients hold every descriptor could neither serve its
backend nor reach its database.
"""

from __future__ import annotations

import errno
import resource
import socket

import trio

from chatd.config import split_bind
from chatd.errors import OperatorError

BACKLOG = 4096  # connections the kernel holds while a burst is accepted
USER_TIMEOUT = 20_000  # milliseconds until unread bytes to a vanished peer end its connection

RESERVED = 256  # descriptors that are left to the API, the database and Redis, or
RESERVED_SHARE = 4  # a quarter of them, where there are few
RAISED_MOST = 1_048_576  # where the hard limit is none


class Gate(trio.abc.Listener[trio.SocketStream]):
    """A listener with room for so many connections. Beyond it the others wait in the kernel's backlog."""

    def __init__(self, listener: trio.SocketListener, places: trio.Semaphore) -> None:
        self._listener, self._places = listener, places

    async def accept(self) -> trio.SocketStream:
        """The caller gives the place back with `places.release()` when the connection has ended."""
        await self._places.acquire()
        try:
            return await self._listener.accept()
        except BaseException:
            self._places.release()
            raise

    async def aclose(self) -> None:
        await self._listener.aclose()


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


def open_sockets(*binds: tuple[str, str]) -> list[socket.socket]:
    """All of them, given as (key, bind), or none."""
    opened: list[socket.socket] = []
    try:
        for key, bind in binds:
            opened.append(open_socket(key, bind))
    except OperatorError:
        for one in opened:
            one.close()
        raise
    return opened


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
            opened.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)
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
