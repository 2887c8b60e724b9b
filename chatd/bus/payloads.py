"""Encodes and decodes chatd's payloads in Redis, and checks the payloads of other services.

These functions do no I/O. Any service with access to Redis may write invalid bytes, so no
bytes make them raise.
"""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import UNSET, Struct, UnsetType

from chatd.core.ids import number_of
from chatd.core.limits import MAX_ID
from chatd.core.model import Change, Kick, Kind, MemberChange, Notice, Present, Signal, UserChange
from chatd.core.protocol import RESERVED_EVENTS
from chatd.observe import metrics
from chatd.observe.logs import Recurring

FOREIGN_BYTES = 65536  # chatd drops larger payloads of other services

MESSAGE = "message"
_REASONS = ("too_large", "no_object", "conversation_id", "event")
_refused = {reason: Recurring("foreign_payload_refused", every=60) for reason in _REASONS}
_IDS = ("id", "user_id", "sender_id", "reply_to")


class _Head(Struct):
    """The keys of a change that the fanout needs. The payload itself is not decoded."""

    event: str
    conversation_id: int
    seq: int
    mark: str | None = None


AnySignal = MemberChange | UserChange | Notice | Kick | Present


class Envelope(Struct, frozen=True):
    """A signal on the channel, and the node that sent it."""

    node: str
    signal: AnySignal


_UNREADABLE = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
_KINDS = {"message": Kind.CREATED, "message.updated": Kind.EDITED, "message.deleted": Kind.DELETED}
_OF_A_NODE = re.compile(rb'\{"event":"message(?:\.\w+)?","node":"')
_head = msgspec.json.Decoder(_Head)
_envelope = msgspec.json.Decoder(Envelope)


def with_node(payload: bytes, node: str) -> bytes:
    """A change for the channel: its payload with the node inserted, `{"event":"message","node":"…",…`."""
    event, comma, rest = payload.partition(b",")
    return b'%b,"node":"%b"%b%b' % (event, node.encode(), comma, rest)


def entry(payload: bytes, node: str, members_version: int, previous: str | UnsetType | None) -> dict[Any, Any]:
    """A change for the stream. `p` is `previous`: empty if it is None, left out if it is UNSET."""
    known = {} if previous is UNSET else {"p": previous or ""}
    return {"m": payload, "n": node, "v": members_version} | known


def change_of(fields: dict[bytes, bytes]) -> Change | None:
    """The change in an entry of the stream.

    None: not valid or from a newer version; the sweep finds the change.
    """
    payload = fields.get(b"m", b"")
    try:
        payload.decode()  # clients get these bytes as they are, so they must be valid UTF-8
        head = _head.decode(payload)
        version = int(fields.get(b"v", b"0"))
        previous = fields[b"p"].decode() or None if b"p" in fields else UNSET
        kind = _KINDS[head.event]
        return Change(head.conversation_id, head.seq, kind, payload, version, head.mark, previous)
    except (*_UNREADABLE, KeyError, ValueError):
        return None


def signal(node: str, signal: Signal) -> bytes:
    return msgspec.json.encode({"node": node, "signal": signal})


def signal_of(data: bytes) -> Envelope | None:
    """The signal in a publication; None if it is not valid or from a newer version of chatd."""
    try:
        data.decode()  # clients get a notice's bytes as they are, so they must be valid UTF-8
        return _envelope.decode(data)
    except _UNREADABLE:
        return None


def _refuse(reason: str, **found: Any) -> None:
    metrics.FOREIGN_REFUSED.labels(reason).inc()
    _refused[reason].warn(reason=reason, **found)


def foreign_of(data: bytes) -> tuple[int, str, bytes] | None:
    """(conversation_id, event name, payload) of another service's publication, which is an
    object without `node`.

    None if a node published it, or if chatd refuses it, which is logged.
    """
    if _OF_A_NODE.match(data):
        return None  # a quick check of the first bytes, because most publications come from nodes
    if len(data) > FOREIGN_BYTES:
        _refuse("too_large", bytes=len(data), most=FOREIGN_BYTES)
        return None
    payload = _object(data)
    if payload is None:
        _refuse("no_object", bytes=len(data))
        return None
    if "node" in payload:
        return None
    conversation_id = number_of(payload.get("conversation_id"))
    if type(conversation_id) is not int or not 1 <= conversation_id <= MAX_ID:
        _refuse("conversation_id", found=repr(payload.get("conversation_id"))[:100])
        return None
    name = payload.get("event")
    name = MESSAGE if name is None else name
    if not isinstance(name, str) or not name or (name in RESERVED_EVENTS and name != MESSAGE):
        # Clients would mistake an event with one of chatd's names for chatd's own.
        _refuse("event", conversation_id=conversation_id, found=repr(name)[:100])
        return None
    body = {key: value for key, value in payload.items() if key not in ("event", "seq")}
    ids = _IDS if name == MESSAGE else ()  # what is in an event of others is their affair
    body |= {key: number_of(body[key]) for key in ids if key in body}
    return (
        conversation_id,
        name,
        msgspec.json.encode({"event": name} | body | {"conversation_id": conversation_id}),
    )


def _object(data: bytes) -> dict[str, Any] | None:
    try:
        found = msgspec.json.decode(data)
    except _UNREADABLE:
        return None
    return found if isinstance(found, dict) else None
