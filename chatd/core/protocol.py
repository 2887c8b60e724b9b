"""The wire format `chatd.v1`: decodes commands, encodes events, builds frames. It does no I/O.

The session executes the commands; the store and the hub use the encoders. docs/protocol.md is the
specification.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal, get_args

import msgspec
from msgspec import UNSET, Meta, Struct

from chatd.core import limits
from chatd.core.errors import BadRequest, ChatError, FieldTooLarge, Final, NotJSON, UnknownEvent
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
    """A command from a client. Exactly one reply carries its `ref`. A field of null is the same as no field."""

    ref: Ref | None = None


class Since(Struct, frozen=True, kw_only=True):
    """The last change of a room that a client has: its `seq` and its mark."""

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
    """The base of commands about one message."""

    conversation_id: Id
    id: Id


class Edit(OfMessage, frozen=True, kw_only=True, tag="edit"):
    """A field that is left out stays as it is. A `meta` of null removes the message's `meta`."""

    content: Content | None = None
    meta: Any = UNSET


class Delete(OfMessage, frozen=True, kw_only=True, tag="delete"):
    pass


class React(OfMessage, frozen=True, kw_only=True, tag="react"):
    emoji: Emoji
    on: bool


class Read(OfMessage, frozen=True, kw_only=True, tag="read"):
    """The user has read all messages up to this one."""


class Delivered(OfMessage, frozen=True, kw_only=True, tag="delivered"):
    """The client has received all messages up to this one."""


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

# Event names of §3 and §4 of docs/protocol.md, which another service's payload on Redis must not use.
RESERVED_EVENTS = frozenset(
    "auth refresh subscribe unsubscribe send edit delete react read delivered typing history ping pong"  # noqa: SIM905
    " hello ready subscribed message message.updated message.deleted receipt presence member unsubscribed"
    " reconnect ok error".split()
)


class CommandError(Exception):
    """A frame is not a valid command.

    `ref` is the frame's own, or None if it has none that can be sent back.
    """

    def __init__(self, error: ChatError, ref: Any = None) -> None:
        super().__init__(str(error))
        self.error, self.ref = error, ref


def decode_command(text: str | bytes) -> AnyCommand:
    """Read one frame. Raises NotJSON if it holds no JSON object, CommandError if the object is not a valid
    command.
    """
    try:
        command: AnyCommand = _commands.decode(text)
        return command
    except (msgspec.DecodeError, RecursionError) as error:
        raise _explain(text, error) from None


def _explain(text: str | bytes, error: Exception) -> CommandError:
    try:
        # The standard library also reads JSON that msgspec refuses, such as a lone surrogate or 1e999. Such a
        # frame is an error of one command; only a frame that is not JSON closes the connection.
        data = json.loads(text)
    except (ValueError, RecursionError):
        raise NotJSON(Final.NO_JSON.sentence) from None
    if not isinstance(data, dict):
        raise NotJSON(Final.NO_JSON.sentence)
    try:
        ref = msgspec.convert(data.get("ref"), Ref | None)
        msgspec.json.encode(ref)  # raises if `ref` holds a lone surrogate, which cannot be sent back
    except (msgspec.ValidationError, UnicodeEncodeError):
        ref = None
    if not isinstance(error, msgspec.ValidationError):
        return CommandError(BadRequest("the frame holds text or a number that chatd cannot store"), ref)
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
    """The top-level field that msgspec's error names; None if it names none."""
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
    """The first event on a connection: the limits that a client needs before it sends anything.

    Arguments are in seconds, bytes and characters; `rooms` is the most rooms that one connection may enter. The
    event itself gives the times of `reconnect` in milliseconds.
    """
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
    """The position that a client sent.

    A mark that is left out or null means that the client does not know it.
    """
    if since is None or isinstance(since, int):
        return Position(since)
    return Position(since.after, UNSET if since.mark is None else since.mark)


def change_payload(kind: Kind, seq: int, message: Message, mark: str | None = None) -> bytes:
    """A change as JSON, the same for every client: the message as it is now, with the change's `seq` and
    `mark`.

    The bytes are put together by hand so that msgspec encodes the message only once.
    """
    body = msgspec.json.encode(message if message.seq == seq else msgspec.structs.replace(message, seq=seq))
    if mark is None:
        return b'{"event":"%b",%b' % (_EVENT_NAME[kind].encode(), body[1:])
    return b'{"event":"%b",%b,"mark":"%b"}' % (_EVENT_NAME[kind].encode(), body[1:-1], mark.encode())


def check_content(content: str, most: int) -> None:
    """Raises TooLarge for more than `most` characters, BadRequest for a NUL, which PostgreSQL cannot store."""
    if len(content) > most:
        raise FieldTooLarge(f"The content has {len(content)} characters; {most} are allowed.", field="content")
    check_label("content", content)


def check_label(field: str, value: str | None) -> None:
    if value is not None and "\0" in value:
        raise BadRequest(f"The {field} holds a NUL character.", field=field)


def check_meta(meta: Any, most: int) -> None:
    """Raises TooLarge for more than `most` bytes of JSON, BadRequest for too many levels of nesting."""
    if meta is None:
        return
    if _depth(meta) > limits.META_DEPTH:
        raise BadRequest(f"The meta is nested more than {limits.META_DEPTH} levels deep.", field="meta")
    size = len(msgspec.json.encode(meta))
    if size > most:
        raise FieldTooLarge(f"The meta has {size} bytes; {most} are allowed.", field="meta")


def _depth(value: Any) -> int:
    """Levels of nested containers. Stops at one level more than META_DEPTH, so the answer may be too small
    there.
    """
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


# A server does not mask its frames (RFC 6455 §5.1), so one frame can be sent to every client as it is.

PING_FRAME = b"\x89\x00"


def text_frame(payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return b"\x81%c%b" % (size, payload)
    if size < 65536:
        return b"\x81\x7e%b%b" % (size.to_bytes(2, "big"), payload)
    return b"\x81\x7f%b%b" % (size.to_bytes(8, "big"), payload)
