"""Finds out which rights an ACL of Redis does not give to chatd's user.

chatd tries each right with a command that changes nothing, because its key does not exist or it fails. Redis
checks the rights before it looks at the arguments.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import redis
from redis.exceptions import NoPermissionError

from chatd.bus.client import SIGNALS, client_of
from chatd.bus.foreign import PREFIXED
from chatd.bus.publisher import PROBE
from chatd.config import Redis, redis_url
from chatd.core.names import Names

OWN_KEYS, OWN_CHANNELS = "~chat.*", "&chat.*"
_TRIALS: dict[str, tuple[str, ...]] = {
    "+ping": ("PING",),
    "+time": ("TIME",),
    "+info": ("INFO", "server"),
    "+scan": ("SCAN", "0", "COUNT", "1"),
    "+memory|usage": ("MEMORY", "USAGE", PROBE),
    "+publish": ("PUBLISH", PROBE, ""),
    "+eval": ("EVAL", "return 1", "1", PROBE),
    "+get": ("GET", PROBE),
    "+set": ("SET", PROBE, "", "XX"),
    "+setrange": ("SETRANGE", PROBE, "0", ""),
    "+pexpire": ("PEXPIRE", PROBE, "1"),
    "+del": ("DEL", PROBE),
    "+exists": ("EXISTS", PROBE),
    "+xadd": ("XADD", PROBE, "NOMKSTREAM", "*", "m", ""),
    "+xread": ("XREAD", "STREAMS", PROBE, "0-0"),
    "+xrange": ("XRANGE", PROBE, "-", "+"),
    "+xrevrange": ("XREVRANGE", PROBE, "+", "-"),
    "+xlen": ("XLEN", PROBE),
    "+xtrim": ("XTRIM", PROBE, "MAXLEN", "1"),
    "+xdel": ("XDEL", PROBE, "0-1"),
    "+xack": ("XACK", PROBE, "chatd", "0-1"),
    "+xreadgroup": ("XREADGROUP", "GROUP", "chatd", "n", "STREAMS", PROBE, ">"),
    "+xautoclaim": ("XAUTOCLAIM", PROBE, "chatd", "n", "0", "0-0"),
    "+xgroup": ("XGROUP", "CREATE", PROBE, "chatd", "0"),
    "+xinfo": ("XINFO", "GROUPS", PROBE),
    "+multi": ("MULTI",),
    "+exec": ("EXEC",),
}
# The first is for another database than 0; the others are tried with each channel.
_UNTRIED = ("+select", "+subscribe", "+psubscribe")


# Laravel's default names: an operator who gives no right to them has no Laravel on this Redis, as a rule.
_OPTIONAL = {*Redis().ingest_streams, *Redis().foreign_channels}


def documented(config: Redis) -> str:
    """Return the rights that chatd needs, in the form of `ACL SETUSER`."""
    streams = [f"~{name}" for name in config.ingest_streams if not name.startswith("chat.")]
    names = [*config.foreign_channels, PREFIXED]
    channels = [f"&{name}" for name in names if not name.startswith("chat.")]
    return " ".join([OWN_KEYS, *streams, OWN_CHANNELS, *channels, *_UNTRIED, *_TRIALS])


def user(config: Redis) -> str:
    return redis_url.read(config.url).username or "default"


def missing(config: Redis) -> list[str]:
    """Return the rights that Redis does not give, in the form of `ACL SETUSER`. Raises one of `LOST`."""
    client = client_of(config)
    try:
        connection = client.connection_pool.get_connection()
        found = [rule for rule in _refused(connection, config) if rule]
        connection.disconnect()  # type: ignore[no-untyped-call]
        return list(dict.fromkeys(found))
    finally:
        client.close()


def _refused(connection: Any, config: Redis) -> Iterator[str | None]:
    for rule, command in _TRIALS.items():
        yield _try(connection, rule, OWN_KEYS, command)
    if config.ingest:
        for name in Names(config.ingest_streams).exact:
            own = name.startswith("chat.")
            if not own and name in _OPTIONAL:
                continue
            yield _try(connection, "+xlen", OWN_KEYS if own else f"~{name}", ("XLEN", name))
    channels = Names(config.foreign_channels)
    for name in (SIGNALS, *channels.exact):
        own = name.startswith("chat.")
        if not own and name in _OPTIONAL:
            continue
        yield _try(connection, "+subscribe", OWN_CHANNELS if own else f"&{name}", ("SUBSCRIBE", name))
    for name in channels.patterns:
        yield _try(connection, "+psubscribe", f"&{name}", ("PSUBSCRIBE", name))


def _try(connection: Any, rule: str, place: str, command: tuple[str, ...]) -> str | None:
    """Try a command. Returns the right that is missing: to run it, or to use its key or channel; else None."""
    connection.send_command(*command)
    try:
        while _is_message(connection.read_response()):
            pass
    except redis.ResponseError as error:
        text = str(error)
        if not isinstance(error, NoPermissionError) and "NOPERM" not in text:  # of EXEC it is an EXECABORT
            return None
        if (
            "to run the" in text
        ):  # first: newer versions add the name of the user, which may hold the other words
            return rule
        if "channel" in text:
            return place if place.startswith("&") else OWN_CHANNELS
        return place if "key" in text else rule
    return None


def _is_message(reply: Any) -> bool:
    """Whether this is a message of a subscription that an earlier trial made, and not an answer."""
    return isinstance(reply, list) and reply[:1] in ([b"message"], [b"pmessage"])
