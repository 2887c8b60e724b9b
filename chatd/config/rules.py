"""Checks values that have the right type but cannot work, alone or together; and reads addresses."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from urllib.parse import parse_qs, urlsplit

from chatd.config import origins, redis_url
from chatd.config.options import Auth, Config, Redis, Webhooks
from chatd.core import callbacks

# chatd must read what it has just written, so every connection must lead to the primary.
TARGETS = ("read-write", "primary")
OWN_NAMES = {"chat.stream", "chat.signals", "chat.kicks", "chat.ingest.dead"}  # in Redis
# Least length of a secret (RFC 7518, section 3.2).
SECRET_BYTES = {"HS256": 32, "HS384": 48, "HS512": 64}
_WRITE_URL = (
    "is not an HTTP URL; write https://host/path, or http:// for an address in server.private_networks."
)


def split_bind(bind: str) -> tuple[str, int]:
    """Split `"127.0.0.1:8080"`, `"[::1]:8080"` or `":8080"` (every address) into host and port.

    Raises ValueError.
    """
    host, colon, port = bind.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(bind)
    return host.strip("[]"), int(port)


def contradictions(config: Config) -> Iterator[str]:
    """One sentence for each mistake, which starts with `section.key: `."""
    for key, bind in (("api.bind", config.api.bind), ("hub.bind", config.hub.bind)):
        try:
            host, _ = split_bind(bind)
        except ValueError:
            yield f"{key}: {bind!r} is not an address; write host:port, as in 127.0.0.1:8080 (at most 65535)."
            continue
        if config.demo and not is_loopback(host):
            yield f"{key}: everybody knows the demo's token, so it listens on this machine only; use 127.0.0.1."
    yield from _mistakes_in_auth(config.auth)
    yield from _mistakes_in_webhooks(config.webhooks)
    for network in config.server.private_networks:
        if not _is_network(network):
            yield f"server.private_networks: {network!r} is neither an address nor a network."
    yield from _mistakes_in_secrets(config.auth)
    yield from _mistakes_in_database(config.database.url)
    yield from _mistakes_in_redis(config.redis)
    if config.server.workers > 1 and not config.redis.url:
        yield "server.workers: several workers exchange messages through Redis; set redis.url or use 1."
    for origin in config.hub.origins:
        if wrong := origins.mistake(origin):
            yield f"hub.origins: {wrong}."
    for network in config.limits.trusted_proxies:
        if not _is_network(network):
            yield f"limits.trusted_proxies: {network!r} is neither an address nor a network."


def _mistakes_in_database(url: str) -> Iterator[str]:
    if {_scheme(one) for one in _each_host(url)} not in ({"sqlite"}, {"postgresql"}):
        yield (
            "database.url: is not a database URL; write sqlite:///path/to/chatd.db or"
            " postgresql://user:password@host/database."
        )
    elif url in ("sqlite://", "sqlite:///", "sqlite:///:memory:"):
        yield "database.url: a database in memory loses every message at a stop; write a file, sqlite:///chatd.db."
    for target in parse_qs(url.partition("?")[2]).get("target_session_attrs", ()):
        if target not in TARGETS:
            yield (
                f"database.url: target_session_attrs={target} may lead to a standby, which is read-only and"
                " lags behind; write read-write, or leave it out."
            )


def _each_host(url: str) -> Iterator[str]:
    """One URL for each host of postgresql://user@first:5432,second:5432/database."""
    scheme, _, rest = url.partition("://")
    user, at, hosts = rest.partition("/")[0].rpartition("@")
    return (f"{scheme}://{user}{at}{host}" for host in hosts.split(","))


def _mistakes_in_redis(redis: Redis) -> Iterator[str]:
    try:
        if redis.url:
            redis_url.read(redis.url)
    except ValueError as error:
        yield f"redis.url: {error}."
    if redis.ingest and not redis.ingest_streams:
        yield "redis.ingest_streams: is empty; name a stream, or set redis.ingest = false."
    for key, names in (("ingest_streams", redis.ingest_streams), ("foreign_channels", redis.foreign_channels)):
        if own := OWN_NAMES.intersection(names):
            yield f"redis.{key}: {min(own)} is for chatd's own use; leave it out."


def _mistakes_in_auth(auth: Auth) -> Iterator[str]:
    for key, url in (("backend_url", auth.backend_url), ("jwks_url", auth.jwks_url)):
        if not _may_be_called(url):
            yield f"auth.{key}: {_WRITE_URL}"
    public = [name for name in auth.algorithms if name not in SECRET_BYTES]
    if not auth.algorithms:
        yield 'auth.algorithms: is empty, so no token would be valid; write ["HS256"].'
    if public and not (auth.key_files or auth.jwks_url):
        yield f"auth.algorithms: {public[0]} needs a public key; set auth.key_files or auth.jwks_url."
    if (auth.key_files or auth.jwks_url) and not public:
        yield (
            "auth.algorithms: HS256, HS384 and HS512 use neither auth.key_files nor auth.jwks_url; add RS256,"
            " ES256 or EdDSA, or remove those."
        )


def _mistakes_in_secrets(auth: Auth) -> Iterator[str]:
    least, algorithm = max(((SECRET_BYTES.get(name, 32), name) for name in auth.algorithms), default=(32, ""))
    purpose = f" for {algorithm}" if least > 32 else ""
    for key, secret in (("secret", auth.secret), ("previous_secret", auth.previous_secret)):
        size = len(secret.encode())
        if secret and size < least:
            advice = f"use at least {least}{purpose} (openssl rand -hex 32)"
            yield f"auth.{key}: has {size} characters; {advice}."


def _mistakes_in_webhooks(webhooks: Webhooks) -> Iterator[str]:
    for key, url in (("url", webhooks.url), ("before_message_url", webhooks.before_message_url)):
        if not _may_be_called(url):
            yield f"webhooks.{key}: {_WRITE_URL}"
    if (webhooks.url or webhooks.before_message_url) and len(webhooks.secret) < 32:
        yield (
            "webhooks.secret: your backend uses it to verify that a request comes from chatd; set it to at"
            " least 32 characters (openssl rand -hex 32)."
        )
    if not _is_key(webhooks.secret):
        yield (
            f"webhooks.secret: after {callbacks.PREFIX} it needs at least {callbacks.KEY_BYTES} bytes in base64"
            f' (echo "{callbacks.PREFIX}$(openssl rand -base64 32)").'
        )


def _is_key(secret: str) -> bool:
    """Whether a secret that starts with `whsec_` has a valid key after it.

    Every other secret is a valid key.
    """
    try:
        return not secret.startswith(callbacks.PREFIX) or len(callbacks.key_of(secret)) >= callbacks.KEY_BYTES
    except ValueError:
        return False


def _may_be_called(url: str) -> bool:
    return not url or (_scheme(url) in ("http", "https") and bool(urlsplit(url).hostname))


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _scheme(url: str) -> str:
    """The URL's scheme; empty if the URL or its port is not valid."""
    try:
        parts = urlsplit(url)
        return parts.scheme if parts.port is None or parts.port else ""
    except ValueError:
        return ""


def is_loopback_name(host: str) -> bool:
    """Whether the value of a Host header, with or without a port, is a loopback name or address."""
    try:
        return is_loopback(urlsplit(f"//{host}").hostname or "")
    except ValueError:
        return False


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
