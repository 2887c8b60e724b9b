"""Reads `redis.url`. No I/O.

chatd does not leave this to redis-py, which accepts options that do not exist, and options on which chatd
depends (timeouts, the protocol, the decoding of answers).
"""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from msgspec import Struct

from chatd.core.validation import suggestion

FORMS = "is not a Redis URL; write redis://host:6379/0, rediss://… for TLS, or unix:///path/to/redis.sock"
_ENCODE = "write each of @ / ? # : % in a password as its %-code (@ is %40)"

_TCP, _TLS, _UNIX = {"redis", "tcp"}, {"rediss", "tls"}, {"unix"}  # tcp and tls are what Laravel writes
# Option → field of `Address`. Laravel writes `database`. The names with ssl_ are those of redis-py.
_EVERYWHERE = {"db": "db", "database": "db", "username": "username", "password": "password"}
_OF_TLS = {
    "ssl_ca_certs": "ca_certs",
    "ssl_certfile": "certfile",
    "ssl_keyfile": "keyfile",
    "ssl_cert_reqs": "verify",
    "ssl_check_hostname": "check_hostname",
}
OPTIONS = tuple(_EVERYWHERE | _OF_TLS)
_CHOICES = {
    "ssl_cert_reqs": {"required": True, "none": False},
    "ssl_check_hostname": {"true": True, "1": True, "false": False, "0": False},
}


class Address(Struct, frozen=True):
    """The address of Redis and the login. `socket` is the path of a Unix socket; None: TCP."""

    host: str = "localhost"
    port: int = 6379
    socket: str | None = None
    db: int = 0
    username: str | None = None
    password: str | None = None
    tls: bool = False
    ca_certs: str | None = None
    certfile: str | None = None
    keyfile: str | None = None
    verify: bool = True
    check_hostname: bool = True


def read(url: str) -> Address:
    """Read a URL. Raises ValueError, whose text has no part of a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(FORMS) from None
    if parts.scheme not in _TCP | _TLS | _UNIX or port == 0:
        raise ValueError(FORMS)
    if parts.fragment:
        raise ValueError(f"a Redis URL has no # part; {_ENCODE}")
    return Address(**_place(parts, port), **_options(parts))  # type: ignore[arg-type]


def _place(parts: SplitResult, port: int | None) -> dict[str, object]:
    if parts.scheme in _UNIX:
        if parts.hostname or len(parts.path) < 2:
            raise ValueError("write the path of a Unix socket after three slashes: unix:///path/to/redis.sock")
        return {"socket": unquote(parts.path)}
    host = unquote(parts.hostname or "localhost")
    try:
        host.encode("idna")  # as the resolver does
    except UnicodeError:
        raise ValueError(f"{host!r} cannot be the name of a host") from None
    return {"host": host, "port": port or 6379, "tls": parts.scheme in _TLS}


def _options(parts: SplitResult) -> dict[str, object]:
    """The options from the login before the host, from the path, and from the query."""
    found: dict[str, object] = {}
    given = [("username", unquote(parts.username or "")), ("password", unquote(parts.password or ""))]
    path = parts.path.strip("/")
    if parts.scheme not in _UNIX and path:
        if not _is_number(path):
            raise ValueError(f"write only the number of a database after the host's /, as in /0; {_ENCODE}")
        given.append(("db", path))
    for name, text in [one for one in given if one[1]] + parse_qsl(parts.query, keep_blank_values=True):
        key, value = _option(name, text, tls=parts.scheme in _TLS)
        if found.setdefault(key, value) != value:
            raise ValueError(f"{name} is given twice, with different values")
    return found


def _option(name: str, text: str, *, tls: bool) -> tuple[str, object]:
    known = _EVERYWHERE | _OF_TLS
    if name not in known:
        # A part of a password with a ? in it ends up here, so the error repeats only valid option names.
        shown = f"there is no option {name}{suggestion(name, known)}" if name.isidentifier() else _ENCODE
        raise ValueError(f"{shown}; chatd accepts {', '.join(OPTIONS)}, and sets all other options itself")
    if name in _OF_TLS and not tls:
        raise ValueError(f"{name} is only for TLS: write rediss://, or remove it")
    if known[name] == "db" and not _is_number(text):
        raise ValueError(f"{name} must be the number of a database")
    choices = _CHOICES.get(name)
    if choices and text.lower() not in choices:
        raise ValueError(f"{name} must be {' or '.join(choices)}")
    if not text:
        raise ValueError(f"{name} is empty")
    if known[name] == "db":
        return "db", int(text)
    return known[name], choices[text.lower()] if choices else text


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10
