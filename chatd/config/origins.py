"""Origins: what `hub.origins` may name, and whether a page of an origin may come. Pure.

A browser writes an origin in one way alone (RFC 6454, §6.1): small letters, no port that the scheme implies, no
user, no path. It is compared as a string, so that in the configuration it must be written in the same way.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import urlsplit

OPAQUE = "null"  # of a sandboxed frame, and of a file in most browsers
_PORTS = {"http": 80, "https": 443}
_SHAPE = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://(?P<wild>\*\.)?(?P<host>\[[0-9a-f:.]+\]|[^/?#@:\[\]*\s]*)(?P<port>:[0-9]+)?"
)
_EXAMPLES = "https://chat.example.com, https://*.example.com or capacitor://localhost"


def mistake(text: str) -> str | None:
    """What is wrong with an entry of `hub.origins`, for its operator."""
    if text == OPAQUE:
        return None
    found = _SHAPE.fullmatch(text)
    usual = _usual(text)
    if found is None:
        better = f"; write {usual}" if usual and _SHAPE.fullmatch(usual) else f"; write {_EXAMPLES}"
        return f"{text!r} is no origin as browsers send it{better}"
    scheme, host, port = found["scheme"], found["host"], found["port"]
    if usual != text:
        return f"{text!r} is no origin as browsers send it; write {usual}"
    if scheme in _PORTS and (not host or not host.isascii() or host.startswith(".")):
        return f"{text!r} names no host; write {_EXAMPLES}, and a name with other letters as its xn--… form"
    if port and not 0 < int(port[1:]) <= 65535:
        return f"{text!r} has a port that there is not"
    if found["wild"] and (scheme not in _PORTS or host.startswith("[") or "." not in host):
        return f"{text!r}: a * stands for names below a domain of your own, as in https://*.example.com"
    return None


def _usual(text: str) -> str | None:
    """The same as a browser would write it."""
    scheme, separator, rest = text.strip().partition("://")
    place = re.split(r"[/?#]", rest, maxsplit=1)[0].rpartition("@")[2].lower()
    scheme = scheme.lower()
    implied = f":{_PORTS[scheme]}" if scheme in _PORTS else None
    return f"{scheme}://{place.removesuffix(implied) if implied else place}" if separator else None


class AllowedOrigins:
    """Those that `hub.origins` names; where it names none, the host that was asked for, on any port."""

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
        """Names of any depth, and nothing but a name: no user, no path."""
        if not (origin.startswith(scheme) and origin.endswith(rest)):
            return False
        return re.fullmatch(r"[a-z0-9_-]+(\.[a-z0-9_-]+)*", origin[len(scheme) : -len(rest)]) is not None
