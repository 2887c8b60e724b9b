"""Replies to commands. They are sent even when a close frame is due: the client shall learn the outcome."""

from __future__ import annotations

from typing import Any

from chatd.core import protocol
from chatd.core.errors import ChatError
from chatd.core.protocol import event, text_frame
from chatd.hub.services import Line


def tell_ok(line: Line, ref: Any, **fields: Any) -> None:
    """Send an `ok`, unless the command had no `ref`."""
    if ref is not None:
        line.reply(text_frame(event("ok", ref, **fields)))


def tell_error(line: Line, error: ChatError, ref: Any = None) -> None:
    line.reply(text_frame(protocol.error_event(error, ref)))
