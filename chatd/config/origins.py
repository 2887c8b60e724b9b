"""Checks the entries of `hub.origins`, and decides whether a page of an origin may connect. No I/O.

A browser writes an origin in exactly one way (RFC 6454 §6.1): lower case, no default port of the scheme, no
user, no path. chatd compares origins as strings, so the configuration must write them in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

OPAQUE = "null"  # what browsers send for a sandboxed frame, and most of them for a local file
_PORTS = {"http": 80, "https": 443}
_SHAPE = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<wild>\*\.)?(?P<host>\[[0-9a-f:.]+\]|[^/?#@:\[\]*\s]*)(?P<port>:[0-9]+)?"
)
_EXAMPLES = "https://chat.example.com, https://*.example.com or capacitor://localhost"


def mistake(text: str) -> str | None:
    """Why `text` is not a valid entry of `hub.origins`, with a better one; None if it is valid."""
    if text == OPAQUE:
        return None
    found = _SHAPE.fullmatch(text)
    usual = _usual(text)
    if found is None:
        better = f"; write {usual}" if usual and _SHAPE.fullmatch(usual) else f"; write {_EXAMPLES}"
        return f"{text!r} is not an origin as browsers send it{better}"
    scheme, host, port = found["scheme"], found["host"], found["port"]
    if usual != text:
        return f"{text!r} is not an origin as browsers send it; write {usual}"
    if scheme in _PORTS and (not host or not host.isascii() or host.startswith(".")):
        return f"{text!r} has no valid host; write {_EXAMPLES}, and an international name in its xn--… form"
    if port and not 0 < int(port[1:]) <= 65535:
        return f"{text!r} has a port that does not exist; write 1 to 65535"
    if found["wild"] and (scheme not in _PORTS or host.startswith("[") or "." not in host):
        return f"{text!r}: a * stands only for the names below your own domain, as in https://*.example.com"
    return None


def _usual(text: str) -> str | None:
    """`text` as a browser writes it; None if it has no scheme."""
    scheme, separator, rest = text.strip().partition("://")
    place = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2].lower()
    scheme = scheme.lower()
    implied = f":{_PORTS[scheme]}" if scheme in _PORTS else None
    return f"{scheme}://{place.removesuffix(implied) if implied else place}" if separator else None


class AllowedOrigins:
    """The origins in `hub.origins`. If there are none: the host of the request itself, on any port."""

    def __init__(self, listed: Sequence[str]) -> None:
        self._exact = frozenset(one for one in listed if "*" not in one)
        # `https://*.example.com:8443` → ("https://", ".example.com:8443")
        self._below = [(scheme, rest) for scheme, star, rest in (one.partition("*") for one in listed) if star]

    def allow(self, origin: str, host: str) -> bool:
        if self._exact or self._below:
            return origin in self._exact or any(self._is_below(origin, *one) for one in self._below)
        try:
            return urlsplit(origin).hostname == urlsplit(f"//{host}").hostname is not None
        except ValueError:
            return False

    @staticmethod
    def _is_below(origin: str, scheme: str, rest: str) -> bool:
        """Whether the * stands for one or more labels of a host name. It must not match a user or a path."""
        if not (origin.startswith(scheme) and origin.endswith(rest)):
            return False
        return re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", origin[len(scheme) : -len(rest)]) is not None
