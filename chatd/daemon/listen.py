"""Opens the listening sockets, or takes them over from systemd or a parent. This happens before anything else
starts, so that a port that is in use ends chatd with a clear message.
"""

from __future__ import annotations

import errno
import os
import socket

from chatd.config import Config, split_bind
from chatd.core.errors import OperatorError
from chatd.daemon import systemd
from chatd.net.gate import BACKLOG

USER_TIMEOUT = 20_000  # milliseconds until unacknowledged bytes to a vanished peer end its connection
# SO_SNDBUF in bytes. Linux doubles it, and so holds 180 KB at most for a client that does not read; its default
# allows 4 MB. TCP_NOTSENT_LOWAT was no alternative, because it bounds only bytes that were not sent yet: for a
# client that read fast and then stopped, the kernel still held 600 KB.
SEND_BUFFER = 64 * 1024

# Names of inherited sockets (FileDescriptorName= of the socket unit, or the unit's own name), and their use.
NAMES = {"api": "api", "chatd-api.socket": "api", "hub": "hub", "chatd.socket": "hub"}
# Without names the number of sockets decides: one socket is the hub's; two are in the order of chatd.toml.
UNNAMED = {1: ["hub"], 2: ["api", "hub"]}


def address_of(listening: socket.socket) -> str:
    """Return the socket's address as `host:port`, in the form that a `bind` option has."""
    host, port = listening.getsockname()[:2]
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def open_sockets(config: Config) -> tuple[socket.socket, list[socket.socket]]:
    """Return the API's socket and the hub's sockets. Inherited sockets are used; the others are opened.

    Raises OperatorError, and closes all of them then.
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
    """Replace the names of inherited sockets by `api` and `hub`."""
    if all(name in ("", "unknown") for name, _ in handed_over) and len(handed_over) in UNNAMED:
        names = UNNAMED[len(handed_over)]
        return [(name, descriptor) for name, (_, descriptor) in zip(names, handed_over, strict=True)]
    for name, _ in handed_over:
        if name not in NAMES:
            raise OperatorError(
                f"A socket is handed over as {name!r}. Name it `hub` or `api`: FileDescriptorName= in its unit."
            )
    return [(NAMES[name], descriptor) for name, descriptor in handed_over]


def _adopt(name: str, descriptor: int) -> socket.socket:
    """Take over an inherited socket and set chatd's options on it. Raises OperatorError."""
    wrong = (
        f"The socket handed over as `{name}` is not a listening TCP socket: "
        "write ListenStream=host:port in its unit."
    )
    try:
        os.set_inheritable(descriptor, False)
        adopted = socket.socket(fileno=descriptor)
    except OSError as error:
        raise OperatorError(wrong) from error
    # It could also be UDP, a UNIX socket (whose peers have no address), or one connection (Accept=yes).
    is_tcp = adopted.family in (socket.AF_INET, socket.AF_INET6) and adopted.type == socket.SOCK_STREAM
    if not is_tcp or not adopted.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        adopted.close()
        raise OperatorError(wrong)
    _bound_waiting(name, adopted)
    adopted.setblocking(False)
    return adopted


def _bound_waiting(name: str, listening: socket.socket) -> None:
    """Bound the time and the bytes for a peer that does not read. Accepted connections inherit the options."""
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT)
    if name.startswith("hub"):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SEND_BUFFER)


def open_socket(key: str, bind: str) -> socket.socket:
    """Open a listening socket for `host:port`. Without a host it listens on all addresses, IPv6 and IPv4.

    Raises OperatorError with the configuration key in its message.
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
        return "this is not a host name."
    if error.errno == errno.EADDRINUSE:
        return (
            f"another program uses this port. Stop it, or choose another port: {variable}=127.0.0.1:18080, say."
        )
    if error.errno == errno.EACCES:
        return "this user may not listen on ports below 1024. Choose a higher port."
    return f"{error.strerror or error}."
