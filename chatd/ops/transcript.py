"""Formats events of a room as lines for a terminal. Users' texts are escaped, because control characters could
move the cursor, set the window's title, or imitate another user's line.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from datetime import datetime
from typing import Any

Event = dict[str, Any]
Style = Callable[[str], str]

JOINER = "\u200d"  # joins the parts of an emoji, and is harmless
INDENT = "    "  # before the further lines of a message, so that none of them looks like a message of its own
QUIET = frozenset(["typing", "receipt", "presence"])  # events that are shown only with --all


def printable(text: str) -> str:
    """Escape all characters that are not visible, except line ends."""
    return "".join(_printable(character) for character in text.replace("\r\n", "\n"))


def _printable(character: str) -> str:
    if character == "\t" or unicodedata.category(character) == "Zs":
        return " "
    if character in ("\n", JOINER) or character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def as_json(event: Event) -> str:
    """Format an event as one line of ASCII. JSON alone does not escape all control characters of terminals."""
    return json.dumps(event, separators=(",", ":"))


def as_line(event: Event, emphasize: Style = str) -> str:
    """Format an event as time, user and text. Further lines of the text are indented."""
    when = _clock(event.get("created_at")) if event["event"] == "message" else _clock(None)
    said = printable(_said(event)).replace("\n", "\n" + INDENT)
    who = f"{event['user_id']}: " if event["event"] == "message" and "user_id" in event else ""
    return f"{when}  {emphasize(who)}{said}"


def _said(event: Event) -> str:
    id, user = event.get("id"), event.get("user_id")
    match event["event"]:
        case "message":
            meta = f" {json.dumps(event['meta'], ensure_ascii=False)}" if event.get("meta") else ""
            kind = "" if event.get("type", "text") == "text" else f"[{event['type']}] "
            return f"{kind}{event.get('content') or ''}{meta}"
        case "message.deleted":
            return f"– message {id} of {user} was deleted"
        case "message.updated" if event.get("reactions"):
            given = ", ".join(f"{emoji} {_names(users)}" for emoji, users in event["reactions"].items())
            return f"– message {id} of {user}: {given}; {event.get('content') or ''}"
        case "message.updated":
            return f"– message {id} of {user} is now: {event.get('content') or ''}"
        case "member":
            return f"– {user} was {event.get('change')}"
        case "typing":
            return f"– {user} {'is typing' if event.get('active') else 'stopped typing'}"
        case "receipt":
            marks = [f"{mark} {event[mark]}" for mark in ("read", "delivered") if mark in event]
            return f"– {user} has {' and '.join(marks)}"
        case "presence":
            return f"– {user} is {'online' if event.get('online') else 'offline'}"
        case name:
            return f"– {name} {json.dumps(event.get('data'), ensure_ascii=False)}"


def _names(users: list[int]) -> str:
    return " ".join(str(user) for user in users)


def _clock(timestamp: Any) -> str:
    """Return the time of a message, or the present time, in the local zone."""
    try:
        moment = datetime.fromisoformat(timestamp) if timestamp else datetime.now()
    except ValueError:
        moment = datetime.now()
    return moment.astimezone().strftime("%H:%M:%S")
