"""The wire as pure functions: commands in, events and frames out; tokens; rates."""

from __future__ import annotations

import json
import time
from typing import Any, get_args

import jwt
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from wsproto.frame_protocol import FrameDecoder, FrameProtocol

from chatd.auth.tokens import Tokens
from chatd.bus import payloads
from chatd.config import Auth
from chatd.core import protocol
from chatd.core.errors import ChatError, NotJSON, TokenExpired, Unauthorized
from chatd.core.limits import META_DEPTH, TokenBucket
from chatd.core.model import Kind, Message
from chatd.observe import metrics

SECRET = "s" * 64


def message(**fields: Any) -> Message:
    given = {"conversation_id": 1, "id": 10, "user_id": 5, "type": "text", "content": "Hello", "meta": None}
    given |= {"created_at": "2026-01-01T00:00:00.000000Z", "seq": 12, "client_id": None}
    return Message(**given | fields)


def test_a_message_is_the_contracts_example_byte_for_byte() -> None:
    assert protocol.change_payload(Kind.CREATED, 12, message()) == (
        b'{"event":"message","conversation_id":1,"id":10,"user_id":5,"type":"text","content":"Hello","meta":null,'
        b'"created_at":"2026-01-01T00:00:00.000000Z","seq":12,"client_id":null}'
    )


def test_a_change_carries_its_own_seq_and_optional_keys_only_with_a_value() -> None:
    edited = json.loads(
        protocol.change_payload(Kind.EDITED, 15, message(edited_at="2026-01-02T00:00:00.000000Z"))
    )
    assert (edited["event"], edited["seq"], edited["edited_at"]) == (
        "message.updated", 15, "2026-01-02T00:00:00.000000Z",
    )  # fmt: skip
    assert {"reply_to", "deleted_at"}.isdisjoint(edited)


def test_redis_sees_the_node_and_the_stream_does_not() -> None:
    payload = protocol.change_payload(Kind.CREATED, 12, message())
    shown = payloads.with_node(payload, "n1")
    assert shown.startswith(b'{"event":"message","node":"n1","conversation_id":1,')
    assert payloads.foreign_of(shown) is None, "a node's own"
    assert json.loads(shown) == json.loads(payload) | {"node": "n1"}
    back = payloads.change_of({b"m": payload, b"n": b"n1"})
    assert back is not None
    assert (back.conversation_id, back.seq, back.kind, back.payload) == (1, 12, Kind.CREATED, payload)
    for strange in (b"", b"[]", b'{"event":"message"}', b'{"event":"dance","conversation_id":1,"seq":1}'):
        assert payloads.change_of({b"m": strange}) is None


def test_a_foreign_payload_takes_no_name_of_ours() -> None:
    """Shown as a message it would be an empty one; under its name clients would take it for ours."""

    def passed_on(**fields: Any) -> str | None:
        found = payloads.foreign_of(json.dumps({"conversation_id": 1} | fields).encode())
        return found and found[1]

    refused = metrics.FOREIGN_REFUSED.labels("event")._value
    before = refused.get()
    wrong: list[Any] = [*(protocol.RESERVED_EVENTS - {"message"}), "", 5, {}]
    with structlog.testing.capture_logs() as lines:
        for name in wrong:
            assert passed_on(event=name, content="x") is None, name
    assert refused.get() - before == len(wrong)
    assert len(lines) <= 1
    assert passed_on(event="message", content="x") == passed_on(content="x") == "message"
    assert passed_on(event=None, content="x") == "message"
    assert passed_on(event="order.paid", content="x") == "order.paid"


@given(st.binary(max_size=70_000))
def test_a_frame_is_what_a_client_decodes(payload: bytes) -> None:
    decoder = FrameDecoder(client=True)
    decoder.receive_bytes(protocol.text_frame(payload))
    found = b""
    while frame := decoder.process_buffer():
        found += frame.payload
    assert found == payload


def test_the_ping_frame_is_a_ping() -> None:
    client = FrameProtocol(client=True, extensions=[])
    client.receive_bytes(protocol.PING_FRAME)
    (frame,) = client.received_frames()
    assert (frame.opcode, bytes(frame.payload)) == (9, b"")


@pytest.mark.parametrize("text", ["", "nope", "[]", "5", "null", '"x"', "[" * 10_000, '{"a":' * 10_000])
def test_what_is_no_object_is_no_frame(text: str) -> None:
    with pytest.raises(NotJSON):
        protocol.decode_command(text.encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize(
    ("text", "code", "field", "ref"),
    [
        ('{"event":"dance","ref":1}', "unknown_event", "event", 1),
        ('{"ref":"r"}', "bad_request", "event", "r"),
        ('{"event":7,"ref":1}', "bad_request", "event", 1),
        ('{"event":"ping","ref":1.5}', "bad_request", "ref", None),
        (f'{{"event":"ping","ref":"{"x" * 65}"}}', "bad_request", "ref", None),
        ('{"event":"subscribe","ref":1}', "bad_request", "conversation_id", 1),
        ('{"event":"subscribe","ref":1,"conversation_id":1,"after":-1}', "bad_request", "after", 1),
        ('{"event":"auth","ref":1,"token":"t","rooms":{"x":1}}', "bad_request", "rooms", 1),
        ('{"event":"auth","ref":1,"token":"t","rooms":"all"}', "bad_request", "rooms", 1),
        ('{"event":"history","ref":1,"conversation_id":1,"limit":101}', "bad_request", "limit", 1),
        ('{"event":"send","ref":1,"conversation_id":1,"content":""}', "bad_request", "content", 1),
        ('{"event":"send","ref":1,"conversation_id":1,"content":"\\ud83d"}', "bad_request", None, 1),
        ('{"event":"send","ref":1,"conversation_id":1,"content":"x","meta":1e999}', "bad_request", "meta", 1),
        (
            '{"event":"send","ref":1,"conversation_id":1,"content":"x","client_id":""}',
            "bad_request",
            "client_id",
            1,
        ),
    ],
)
def test_what_is_no_command_says_why_and_where(text: str, code: str, field: str | None, ref: Any) -> None:
    with pytest.raises(protocol.CommandError) as refused:
        protocol.decode_command(text)
    assert (refused.value.error.code, refused.value.error.field, refused.value.ref) == (code, field, ref)


COMMANDS: dict[str, dict[str, Any]] = {
    "auth": {"token": "t"},
    "refresh": {"token": "t"},
    "subscribe": {"conversation_id": 1},
    "unsubscribe": {"conversation_id": 1},
    "send": {"conversation_id": 1, "content": "x"},
    "edit": {"conversation_id": 1, "id": 1},
    "delete": {"conversation_id": 1, "id": 1},
    "react": {"conversation_id": 1, "id": 1, "emoji": "x", "on": True},
    "read": {"conversation_id": 1, "id": 1},
    "delivered": {"conversation_id": 1, "id": 1},
    "typing": {"conversation_id": 1, "active": True},
    "history": {"conversation_id": 1},
    "ping": {},
    "pong": {},
}


FIELDS = {str(kind.__struct_config__.tag): kind.__struct_fields__ for kind in get_args(protocol.AnyCommand)}


def refusal(frame: Any) -> ChatError:
    with pytest.raises(protocol.CommandError) as refused:
        protocol.decode_command(json.dumps(frame))
    return refused.value.error


@pytest.mark.parametrize(
    ("event", "fields", "said"),
    [
        ("auth", {"rooms": "1"}, "must be an object or '*'"),
        ("auth", {"rooms": [1]}, "must be an object or '*', not a list"),
        ("auth", {"rooms": {"x": 1}}, "is wrong: each key must be an integer, not text"),
        ("auth", {"rooms": {"0": 1}}, "is wrong: each key must be at least 1"),
        ("auth", {"rooms": {"1": "x"}}, "is wrong: each value must be an integer or an object, not text"),
        ("auth", {"rooms": {"1": {"after": "x"}}}, "is wrong: after must be an integer, not text"),
        ("auth", {"rooms": {"1": {"mark": "m" * 65}}}, "is wrong: mark must have at most 64 characters"),
        ("auth", {"token": None}, "must be text, not null"),
        ("subscribe", {"conversation_id": "1"}, "must be an integer, not text"),
        ("subscribe", {"conversation_id": 2**60}, "must be at most 9007199254740991"),
        ("subscribe", {"after": 1.5}, "must be an integer, not a number"),
        ("subscribe", {"presence": 1}, "must be true or false, not an integer"),
        ("send", {"content": ""}, "must not be empty"),
        ("send", {"content": 5}, "must be text, not an integer"),
        ("react", {"emoji": "x" * 33}, "must have at most 32 characters"),
        ("typing", {"active": "yes"}, "must be true or false, not text"),
        ("ping", {"ref": []}, "must be an integer or text, not a list"),
        (None, {}, "is required"),
        (5, {}, "must be text"),
    ],
)  # fmt: skip
def test_a_refusal_says_which_field_and_what_is_expected(event: Any, fields: Any, said: str) -> None:
    field = next(iter(fields), "event")
    error = refusal({"event": event} | COMMANDS.get(event, {}) | fields)
    assert (error.field, str(error)) == (field, f"The {field} field {said}.")


@pytest.mark.parametrize("event", COMMANDS)
def test_no_refusal_is_in_the_words_of_a_library(event: str) -> None:
    wrong: list[Any] = [
        "",
        "x" * 300,
        0,
        -1,
        1.5,
        2**60,
        True,
        None,
        [],
        [1],
        ["x"],
        {},
        {"a": 1},
        {"1": {"after": -1}},
    ]
    for field in FIELDS[event]:
        for value in wrong:
            frame = {"event": event} | COMMANDS[event] | {field: value}
            try:
                protocol.decode_command(json.dumps(frame))
            except protocol.CommandError as refused:
                said = str(refused.error)
                assert said.startswith(f"The {field} field "), frame
                assert not set("`$") & set(said), said
                assert "not valid" not in said, said
    for field in COMMANDS[event]:
        rest = {name: value for name, value in COMMANDS[event].items() if name != field}
        assert str(refusal({"event": event} | rest)) == f"The {field} field is required."


@pytest.mark.parametrize("event", COMMANDS)
def test_null_says_as_much_as_nothing(event: str) -> None:
    """But for a `meta`, which an edit removes by it: that it may be null is what counts here."""
    optional = set(FIELDS[event]) - set(COMMANDS[event])
    protocol.decode_command(json.dumps({"event": event} | COMMANDS[event] | dict.fromkeys(optional)))


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), lambda inner: (
    st.lists(inner) | st.dictionaries(st.text(), inner)
), max_leaves=20))  # fmt: skip
def test_any_json_is_a_command_or_a_clear_refusal(value: Any) -> None:
    for text in (
        json.dumps(value),
        json.dumps({"event": "send", "ref": 1, "meta": value, "conversation_id": value}),
    ):
        try:
            protocol.decode_command(text)
        except protocol.CommandError as refused:
            json.loads(protocol.error_event(refused.error, refused.ref))
        except NotJSON:
            pass


def test_unknown_keys_are_ignored() -> None:
    command = protocol.decode_command('{"event":"ping","ref":1,"future":{"a":[1]}}')
    assert command == protocol.Ping(ref=1)


def test_meta_is_bounded_in_depth_and_bytes() -> None:
    deep: Any = 1
    for _ in range(META_DEPTH):
        deep = [deep]
    protocol.check_meta(deep, 1000)
    with pytest.raises(ChatError, match="nested"):
        protocol.check_meta([deep], 1000)
    with pytest.raises(ChatError, match="bytes"):
        protocol.check_meta({"a": "x" * 1000}, 1000)


# Tokens.


def sign(claims: dict[str, Any], secret: str = SECRET, algorithm: str = "HS256") -> str:
    return jwt.encode(claims, secret, algorithm=algorithm)


def test_a_token_says_who_and_until_when() -> None:
    tokens = Tokens(SECRET)
    identity = tokens.verify(tokens.issue(7, 60, [3, 1]))
    assert (identity.user_id, identity.conversations) == (7, {1, 3})
    assert 55 < identity.expires_at - time.time() <= 60
    assert identity.issued_at > 0
    by_number = tokens.verify(sign({"sub": 9, "exp": time.time() + 5}))
    assert (by_number.user_id, by_number.issued_at, by_number.conversations) == (9, 0, set())


def test_the_previous_secret_still_counts() -> None:
    old = Tokens("o" * 32).issue(1, 60)
    assert Tokens(SECRET, Auth(previous_secret="o" * 32)).verify(old).user_id == 1
    with pytest.raises(Unauthorized):
        Tokens(SECRET).verify(old)
    with pytest.raises(TokenExpired):
        Tokens(SECRET, Auth(previous_secret="o" * 32)).verify(sign({"sub": "1", "exp": 1}, "o" * 32))


@pytest.mark.parametrize(
    "token",
    [
        "", "x", "a.b.c", "é.ü.ö", "[" * 5000, "." * 100,
        sign({"sub": "1", "exp": 4e9}, "o" * 64),
        sign({"sub": "1", "exp": 4e9}, algorithm="HS512"),
        jwt.encode({"sub": "1", "exp": 4e9}, None, algorithm="none"),
        sign({"sub": "1"}),
        sign({"exp": 4e9}),
        sign({"sub": "x", "exp": 4e9}),
        sign({"sub": "0", "exp": 4e9}),
        sign({"sub": "١", "exp": 4e9}),
        sign({"sub": True, "exp": 4e9}),
        sign({"sub": 2**53, "exp": 4e9}),
        sign({"sub": "1", "exp": float("inf")}),
        sign({"sub": "1", "exp": "soon"}),
        sign({"sub": "1", "exp": 4e9, "iat": "then"}),
        sign({"sub": "1", "exp": 4e9, "conversations": "all"}),
        sign({"sub": "1", "exp": 4e9, "conversations": [1, "two"]}),
        sign({"sub": "1", "exp": 4e9, "filler": "x" * 9000}),
    ],
)  # fmt: skip
def test_what_is_no_valid_token_is_refused(token: str) -> None:
    with pytest.raises(Unauthorized) as refused:
        Tokens(SECRET).verify(token)
    assert refused.value.code == "unauthorized"


# Rates.


def test_a_bucket_gives_its_burst_then_its_rate() -> None:
    bucket = TokenBucket(rate=10, burst=3, now=0)
    assert [bucket.take(0) for _ in range(3)] == [0, 0, 0]
    assert bucket.take(0) == pytest.approx(0.1)
    assert bucket.take(0.1) == 0
    assert bucket.take(100) == 0
    assert [bucket.take(100) > 0 for _ in range(3)] == [False, False, True]
