"""Reads `database.url`: the form of SQLAlchemy, and that of libpq, which may name several hosts."""

from __future__ import annotations

import re

from sqlalchemy import URL, make_url
from sqlalchemy.exc import ArgumentError

from chatd.core.errors import ConfigError

# postgresql://user:password@first:5432,second:5432/database, which SQLAlchemy's make_url does not understand.
_SEVERAL = re.compile(r"(?P<scheme>[\w+]+)://(?:(?P<user>.*)@)?(?P<hosts>[^/@?]+,[^/@?]+)(?P<rest>[/?].*)?")
_DEFAULT_PORT = "5432"


def parse(url: str) -> URL:
    """Read a URL; PostgreSQL's gets the driver psycopg. Raises ConfigError."""
    try:
        parsed = _parse(url)
    except (ArgumentError, ValueError):
        raise ConfigError("database.url: is not a URL; write sqlite:///chatd.db or postgresql://…") from None
    return parsed.set(drivername="postgresql+psycopg") if parsed.get_backend_name() == "postgresql" else parsed


def servers(url: str) -> list[str]:
    """`host:port` of each server in a PostgreSQL URL; for a Unix socket its directory."""
    parsed = parse(url)
    hosts = [parsed.host] if parsed.host else _listed(parsed, "host")
    ports = _listed(parsed, "port") or [str(parsed.port or _DEFAULT_PORT)]
    if not hosts:
        return ["the local socket"]
    return [_place(host, ports[min(number, len(ports) - 1)]) for number, host in enumerate(hosts)]


def _listed(parsed: URL, name: str) -> list[str]:
    """The items of a parameter. libpq separates them by commas; SQLAlchemy has a tuple if one is repeated."""
    found = parsed.query.get(name, "")
    return [one for part in ([found] if isinstance(found, str) else found) for one in part.split(",") if one]


def _place(host: str, port: str) -> str:
    if host.startswith("/"):
        return host
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _parse(url: str) -> URL:
    several = _SEVERAL.fullmatch(url)
    if several is None or not several["scheme"].startswith("postgresql"):
        return make_url(url)
    user = f"{several['user']}@" if several["user"] else ""
    parsed = make_url(f"{several['scheme']}://{user}{several['rest'] or ''}")
    pairs = [_host_and_port(one) for one in several["hosts"].split(",")]
    hosts, ports = (",".join(part) for part in zip(*pairs, strict=True))
    return parsed.update_query_dict({"host": hosts, "port": ports})


def _host_and_port(text: str) -> tuple[str, str]:
    host, colon, port = text.rpartition(":")
    if not colon or port.endswith("]"):
        host, port = text, _DEFAULT_PORT
    return host.strip("[]"), port or _DEFAULT_PORT
