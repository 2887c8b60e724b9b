"""Looks at a socket without waiting and without reading from it."""

from __future__ import annotations

import select
from typing import Protocol


class HasDescriptor(Protocol):
    def fileno(self) -> int: ...


def has(sock: HasDescriptor, events: int) -> bool:
    """Whether one of these events of poll(2) holds now, an error of the socket included."""
    look = select.poll()
    look.register(sock.fileno(), events)
    return bool(look.poll(0))
