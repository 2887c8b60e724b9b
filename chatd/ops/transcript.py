"""Events of a room as lines for a terminal. What people wrote never reaches it raw: it could move the cursor,
set the window's title, or write a line that looks like somebody else's.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable
from datetime import datetime
from typing import Any

Event = dict[str, Any]
Style = Callable[[str], str]

JOINER = "\u200d"  # holds an emoji's parts together, and does nothing else
INDENT = "    "  # before the further lines of a message, so that none begins as a message does
QUIET = frozenset(["typing", "receipt", "presence"])  # not shown unless asked for


def printable(text: str) -> str:
    """The same, with everything that is no visible character written as an escape. Line ends stay."""
    return "".join(_printable(character) for character in text.replace("\r\n", "\n"))


def _printable(character: str) -> str:
    if character == "\t" or unicodedata.category(character) == "Zs":
        return " "
    if character in ("\n", JOINER) or character.isprintable():
        return character
    return character.encode("unicode_escape").decode()


def as_json(event: Event) -> str:
    """One line, of ASCII alone: a terminal's control characters are more than those that JSON escapes."""
    return json.dumps(event, separators=(",", ":"))


def as_line(event: Event, emphasize: Style = str) -> str:
    """When, who, what. The text of several lines has the further ones indented."""
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
            return f"– {user} is {'here' if event.get('online') else 'gone'}"
        case name:
            return f"– {name} {json.dumps(event.get('data'), ensure_ascii=False)}"


def _names(users: list[int]) -> str:
    return " ".join(str(user) for user in users)


def _clock(timestamp: Any) -> str:
    """Local time of a message, or now."""
    try:
        moment = datetime.fromisoformat(timestamp) if timestamp else datetime.now()
    except ValueError:
        moment = datetime.now()
    return moment.astimezone().strftime("%H:%M:%S")
