"""`chatd.v1` on the wire: decode a command, encode an event, build a frame. Bytes in and out, no I/O.

The session acts on the commands; the store and the hub use the encoders. The contract is docs/protocol.md.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, Struct

from chatd.core import limits
from chatd.core.errors import BadRequest, ChatError, NotJSON, TooLarge, UnknownEvent
from chatd.core.model import DEFAULT_TYPE, Kind, Message, Position, now
from chatd.core.validation import mistakes, reason

SUBPROTOCOL = "chatd.v1"

Id = Annotated[int, Meta(ge=1, le=limits.MAX_ID)]
Seq = Annotated[int, Meta(ge=0, le=limits.MAX_ID)]
Ref = Annotated[int, Meta(ge=-limits.MAX_ID, le=limits.MAX_ID)] | Annotated[str, Meta(max_length=64)]
ClientId = Annotated[str, Meta(min_length=1, max_length=limits.CLIENT_ID_CHARS)]
Content = Annotated[str, Meta(min_length=1)]
TypeName = Annotated[str, Meta(min_length=1, max_length=32)]
Emoji = Annotated[str, Meta(min_length=1, max_length=limits.EMOJI_CHARS)]
Mark = Annotated[str, Meta(max_length=64)]
PageSize = Annotated[int, Meta(ge=1, le=limits.HISTORY_PAGE_MAX)]


class Command(Struct, frozen=True, kw_only=True, tag_field="event"):
    """What a client asks for. A `ref` comes back in exactly one reply. Null says as much as nothing."""

    ref: Ref | None = None


class Since(Struct, frozen=True, kw_only=True):
    """Where a client stands in a room: the last change it has, and that change's mark."""

    after: Seq | None = None
    mark: Mark | None = None


class Auth(Command, frozen=True, kw_only=True, tag="auth"):
    token: str
    rooms: dict[Id, Seq | Since | None] | Literal["*"] | None = None
    epoch: str | None = None


class Refresh(Command, frozen=True, kw_only=True, tag="refresh"):
    token: str


class Subscribe(Command, frozen=True, kw_only=True, tag="subscribe"):
    conversation_id: Id
    after: Seq | None = None
    mark: Mark | None = None
    epoch: str | None = None
    presence: bool | None = False


class Unsubscribe(Command, frozen=True, kw_only=True, tag="unsubscribe"):
    conversation_id: Id


class Send(Command, frozen=True, kw_only=True, tag="send"):
    conversation_id: Id
    content: Content
    client_id: ClientId | None = None
    type: TypeName | None = DEFAULT_TYPE
    meta: Any = None
    reply_to: Id | None = None


class OfMessage(Command, frozen=True, kw_only=True):
    """About one message."""

    conversation_id: Id
    id: Id


class Edit(OfMessage, frozen=True, kw_only=True, tag="edit"):
    """A `meta` of null removes it."""

    content: Content | None = None
    meta: Any = UNSET


class Delete(OfMessage, frozen=True, kw_only=True, tag="delete"):
    pass


class React(OfMessage, frozen=True, kw_only=True, tag="react"):
    emoji: Emoji
    on: bool


class Read(OfMessage, frozen=True, kw_only=True, tag="read"):
    """Everything up to it."""


class Delivered(OfMessage, frozen=True, kw_only=True, tag="delivered"):
    """Everything up to it."""


class Typing(Command, frozen=True, kw_only=True, tag="typing"):
    conversation_id: Id
    active: bool


class History(Command, frozen=True, kw_only=True, tag="history"):
    conversation_id: Id
    before: Id | None = None
    after: Id | None = None
    limit: PageSize | None = limits.HISTORY_PAGE


class Ping(Command, frozen=True, kw_only=True, tag="ping"):
    pass


class Pong(Command, frozen=True, kw_only=True, tag="pong"):
    pass


AnyCommand = (
    Auth
    | Refresh
    | Subscribe
    | Unsubscribe
    | Send
    | Edit
    | Delete
    | React
    | Read
    | Delivered
    | Typing
    | History
    | Ping
    | Pong
)

_commands = msgspec.json.Decoder(AnyCommand)
_KINDS = {str(kind.__struct_config__.tag): kind for kind in get_args(AnyCommand)}
_EVENT_NAME = {
    Kind.CREATED: "message",
    Kind.EDITED: "message.updated",
    Kind.REACTED: "message.updated",
    Kind.DELETED: "message.deleted",
}
_FIELD = re.compile(r"(?:at `\$\.([^`.\[]+)|(?:field|in) `(?:\$\.)?([^`.\[]+))")

# Names that a foreign payload on Redis cannot take: §3 and §4 of the contract, from either side.
RESERVED_EVENTS = frozenset(
    "auth refresh subscribe unsubscribe send edit delete react read delivered typing history ping pong"  # noqa: SIM905
    " hello ready subscribed message message.updated message.deleted receipt presence member unsubscribed"
    " reconnect ok error".split()
)


class CommandError(Exception):
    """A frame that is no valid command. `ref` is None when the frame had none that could be echoed."""

    def __init__(self, error: ChatError, ref: Any = None) -> None:
        super().__init__(str(error))
        self.error, self.ref = error, ref


def decode_command(text: str | bytes) -> AnyCommand:
    """Raises NotJSON for what is no JSON object at all, CommandError for an object that is no command."""
    try:
        command: AnyCommand = _commands.decode(text)
        return command
    except (msgspec.DecodeError, RecursionError) as error:
        raise _explain(text, error) from None


def _explain(text: str | bytes, error: Exception) -> CommandError:
    try:
        # The standard library also reads what msgspec refuses: half of an emoji, 1e999. Such a frame is wrong,
        # but it is JSON: its sender may stay.
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise NotJSON("a frame holds one JSON object") from None
    if not isinstance(data, dict):
        raise NotJSON("a frame holds one JSON object")
    try:
        ref = msgspec.convert(data.get("ref"), Ref | None)
        msgspec.json.encode(ref)  # half of an emoji cannot be echoed
    except (msgspec.ValidationError, UnicodeEncodeError):
        ref = None
    if not isinstance(error, msgspec.ValidationError):
        return CommandError(BadRequest("the frame holds text or a number that cannot be kept"), ref)
    return CommandError(_mistake(data, error), ref)


def _mistake(data: dict[str, Any], error: msgspec.ValidationError) -> ChatError:
    name = data.get("event")
    if not isinstance(name, str):
        wrong = "is required" if name is None else "must be text"
        return BadRequest(f"The event field {wrong}.", field="event")
    if name not in _KINDS:
        return UnknownEvent(f"there is no event {name[:64]!r}", field="event")
    for field, (sentence, *_) in mistakes(_KINDS[name], data).items():
        return BadRequest(sentence, field=field)
    where = field_of(error)
    return BadRequest(f"The {where} field {reason(error)}.", field=where)


def field_of(error: msgspec.ValidationError) -> str | None:
    """The top-level field that msgspec complains of."""
    found = _FIELD.search(str(error))
    return (found[1] or found[2]) if found else None


def event(name: str, ref: Any = None, **fields: Any) -> bytes:
    """One event as JSON. A `ref` of None is left out; every other field is sent as it is."""
    head = {"event": name} if ref is None else {"event": name, "ref": ref}
    return msgspec.json.encode(head | fields)


def hello(
    *,
    auth_timeout: float,
    ping_interval: float,
    ping_timeout: float,
    frame_bytes: int,
    content_chars: int,
    rooms: int,
    reconnect_window: float,
) -> bytes:
    """What a client must know before it says anything. Times in seconds; `rooms`: the most it may enter."""
    return event(
        "hello",
        protocol=SUBPROTOCOL,
        server_time=now(),
        auth_timeout=auth_timeout,
        ping_interval=ping_interval,
        ping_timeout=ping_timeout,
        limits={
            "frame": frame_bytes,
            "content": content_chars,
            "rooms": rooms,
            "history": limits.HISTORY_PAGE_MAX,
        },
        reconnect={
            "min": 500,
            "max": 20_000,
            "window": max(1000, round(reconnect_window * 1000)),
        },
    )


def error_event(error: ChatError, ref: Any = None) -> bytes:
    return event("error", ref, **error.body())


def position_of(since: Since | Subscribe | int | None) -> Position:
    """A client that has no mark may leave it out or send null: either says nothing about the change."""
    if since is None or isinstance(since, int):
        return Position(since)
    return Position(since.after, UNSET if since.mark is None else since.mark)


def change_payload(kind: Kind, seq: int, message: Message, mark: str | None = None) -> bytes:
    """A change as everybody gets it: the flat message as it is now, with the change's own `seq` and `mark`."""
    body = msgspec.json.encode(message if message.seq == seq else msgspec.structs.replace(message, seq=seq))
    if mark is None:
        return b'{"event":"%b",%b' % (_EVENT_NAME[kind].encode(), body[1:])
    return b'{"event":"%b",%b,"mark":"%b"}' % (_EVENT_NAME[kind].encode(), body[1:-1], mark.encode())


def check_content(content: str, most: int) -> None:
    if len(content) > most:
        raise TooLarge(f"The content has {len(content)} characters; {most} are allowed.", field="content")
    check_label("content", content)


def check_label(field: str, value: str | None) -> None:
    if value is not None and "\0" in value:
        raise BadRequest(f"The {field} holds a NUL character.", field=field)


def check_meta(meta: Any, most: int) -> None:
    if meta is None:
        return
    if _depth(meta) > limits.META_DEPTH:
        raise BadRequest(f"The meta is nested more than {limits.META_DEPTH} deep.", field="meta")
    size = len(msgspec.json.encode(meta))
    if size > most:
        raise TooLarge(f"The meta has {size} bytes; {most} are allowed.", field="meta")


def _depth(value: Any) -> int:
    """How deep containers are nested; looks no further than one past what is allowed."""
    depth, level = 0, [value] if isinstance(value, dict | list) else []
    while level and depth <= limits.META_DEPTH:
        depth += 1
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return depth


# Frames. What a server sends is unmasked (RFC 6455 §5.1), so a frame is the same bytes for every client.

PING_FRAME = b"\x89\x00"


def text_frame(payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return b"\x81\x7e%b%b" % (size.to_bytes(2, "big"), payload)
    return b"\x81\x7f%b%b" % (size.to_bytes(8, "big"), payload)
