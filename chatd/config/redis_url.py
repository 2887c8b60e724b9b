"""`redis.url`, read. Pure.

chatd reads it itself: redis-py passes every option of a URL on, and so takes those that it does not have, and
those that chatd depends on (time limits, the protocol, how answers are decoded).
"""

from __future__ import annotations

from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from msgspec import Struct

from chatd.core.validation import suggestion

FORMS = "is not a Redis URL; write redis://host:6379/0, rediss://… for TLS, or unix:///path/to/redis.sock"
_ENCODE = "write each of @ / ? # : % in a password as its %-code (@ is %40)"

_TCP, _TLS, _UNIX = {"redis", "tcp"}, {"rediss", "tls"}, {"unix"}  # tcp and tls are what Laravel writes
# What an option is called here. Laravel writes `database`; the names with ssl_ are those of redis-py.
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
    """Where Redis is, and as whom to log in. `socket` is the path of a Unix socket; without one it is TCP."""

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
    """Raises ValueError with a sentence that shows no part of a password."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(FORMS) from None
    if parts.scheme not in _TCP | _TLS | _UNIX or port == 0:
        raise ValueError(FORMS)
    if parts.fragment:
        raise ValueError(f"there is no place for what stands behind the #; {_ENCODE}")
    return Address(**_place(parts, port), **_options(parts))  # type: ignore[arg-type]


def _place(parts: SplitResult, port: int | None) -> dict[str, object]:
    if parts.scheme in _UNIX:
        if parts.hostname or len(parts.path) < 2:
            raise ValueError(
                "the path of a Unix socket begins behind three slashes: unix:///path/to/redis.sock"
            )
        return {"socket": unquote(parts.path)}
    host = unquote(parts.hostname or "localhost")
    return {"host": host, "port": port or 6379, "tls": parts.scheme in _TLS}


def _options(parts: SplitResult) -> dict[str, object]:
    """Of the part before the host, of the path, and of what stands behind the question mark."""
    found: dict[str, object] = {}
    given = [("username", unquote(parts.username or "")), ("password", unquote(parts.password or ""))]
    path = parts.path.strip("/")
    if parts.scheme not in _UNIX and path:
        if not _is_number(path):
            raise ValueError(f"what follows the host's / is the number of a database, as in /0; {_ENCODE}")
        given.append(("db", path))
    for name, text in [one for one in given if one[1]] + parse_qsl(parts.query, keep_blank_values=True):
        key, value = _option(name, text, tls=parts.scheme in _TLS)
        if found.setdefault(key, value) != value:
            raise ValueError(f"{name} is given twice, and not the same")
    return found


def _option(name: str, text: str, *, tls: bool) -> tuple[str, object]:
    known = _EVERYWHERE | _OF_TLS
    if name not in known:
        # A password with a ? in it ends up here: only what looks like an option is repeated.
        shown = f"there is no option {name}{suggestion(name, known)}" if name.isidentifier() else _ENCODE
        raise ValueError(f"{shown}; chatd takes {', '.join(OPTIONS)}, and sets all else itself")
    if name in _OF_TLS and not tls:
        raise ValueError(f"{name} is for TLS: write rediss:// in front, or leave it out")
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
