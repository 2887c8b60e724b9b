"""The HTTP contract for backends: answers, errors as a Laravel client expects them, idempotency, members."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from http.client import HTTPConnection
from typing import Any

import pytest
import structlog.testing
import trio
import trio.testing

from chatd.api.routes.post_message import Post
from chatd.api.schemas import BODY_BYTES, BODY_SECONDS
from chatd.config.options import Api, Config
from chatd.config.settings import Settings
from tests.client import login
from tests.conftest import Daemons
from tests.daemon import Daemon

MESSAGES = "/api/ws/messages"


async def in_thread(work: Any, *arguments: Any) -> Any:
    return await trio.to_thread.run_sync(work, *arguments)


def test_the_original_request_is_answered_as_ever(demo: Daemon) -> None:
    answer = demo.request(
        "POST",
        MESSAGES,
        {"conversation_id": 1, "sender_id": 1, "content": "Hello"},
        {"Accept": "application/json"},
    )
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "application/json"
    assert (answer.json["id"], answer.json["status"], answer.json["seq"]) == (1, "ok", 1)
    assert set(answer.json) == {"id", "status", "seq", "created_at"}


@pytest.mark.parametrize("token", [None, "", "wrong", "Sécret"])
def test_without_the_token_everything_is_unauthorized(daemon: Daemon, token: str | None) -> None:
    for method, path in (
        ("POST", MESSAGES),
        ("GET", "/api/ws/nothing"),
        ("GET", "/"),
        ("GET", "/demo/token?user=1"),
    ):
        answer = daemon.request(method, path, b"{}", {"X-Internal-Token": token or ""})
        assert answer.status == 401
        assert answer.json == {"message": "Unauthorized", "code": "unauthorized"}


def test_a_failed_validation_names_every_field(daemon: Daemon) -> None:
    answer = daemon.request("POST", MESSAGES, {"conversation_id": "x", "content": "", "client_id": "x" * 65})
    assert answer.status == 422
    assert answer.json["code"] == "bad_request"
    assert set(answer.json["errors"]) == {"conversation_id", "sender_id", "content", "client_id"}
    assert answer.json["errors"]["sender_id"] == ["The sender_id field is required."]
    assert (
        answer.json["message"] == "The conversation_id field must be an integer, not text. (and 3 more errors)"
    )


@pytest.mark.parametrize(
    ("body", "status", "field"),
    [
        (b"{", 400, None),
        (b"", 400, None),
        (b"\xff\xfe", 400, None),
        (b"[]", 422, None),
        (
            b'{"conversation_id":1,"sender_id":1,"content":"x","meta":' + b"[" * 40 + b"]" * 40 + b"}",
            422,
            "meta",
        ),
        (b'{"conversation_id":1,"sender_id":1,"content":"a\\u0000b"}', 422, "content"),
        (b'{"conversation_id":9007199254740992,"sender_id":1,"content":"x"}', 422, "conversation_id"),
        (b'{"conversation_id":1,"sender_id":1,"content":"x","reply_to":123456}', 422, "reply_to"),
        (json.dumps({"conversation_id": 1, "sender_id": 1, "content": "x" * 8001}).encode(), 422, "content"),
    ],
)
def test_bad_bodies_get_a_code_and_the_field(
    daemon: Daemon, body: bytes, status: int, field: str | None
) -> None:
    answer = daemon.request("POST", MESSAGES, body)
    assert answer.status == status, answer.body
    assert answer.json["code"] in ("bad_request", "too_large")
    assert field is None or list(answer.json["errors"]) == [field]


def test_a_retry_with_an_idempotency_key_makes_no_second_message(daemon: Daemon, conversation: int) -> None:
    body = {"conversation_id": conversation, "sender_id": 1, "content": "once"}
    first, again = (daemon.request("POST", MESSAGES, body, {"Idempotency-Key": "k-1"}).json for _ in range(2))
    assert (again["id"], again["seq"], again["duplicate"]) == (first["id"], first["seq"], True)
    other = daemon.request("POST", MESSAGES, body | {"content": "twice"}, {"Idempotency-Key": "k-1"})
    assert (other.status, other.json["code"]) == (409, "conflict")
    same = daemon.request("POST", MESSAGES, body | {"client_id": "k-1"})
    assert same.json["id"] == first["id"]
    long = daemon.request("POST", MESSAGES, body, {"Idempotency-Key": "k" * 65})
    assert (long.status, list(long.json["errors"])) == (422, ["Idempotency-Key"])


def test_a_batch_accepts_and_refuses_each_on_its_own(daemon: Daemon, conversation: int) -> None:
    def message(content: Any, **fields: Any) -> dict[str, Any]:
        return {"conversation_id": conversation, "sender_id": 1, "content": content} | fields

    batch = [
        message("a"), message(""), "nonsense", message("b", client_id="k"), message("b", client_id="k"),
        message("c", client_id="k"), message("x" * 9000), message("d"),
    ]  # fmt: skip
    answer = daemon.request("POST", f"{MESSAGES}/batch", {"messages": batch})
    assert answer.status == 200
    results = answer.json["results"]
    assert [r.get("code", r.get("seq")) for r in results] == [
        1, "bad_request", "bad_request", 2, 2, "conflict", "too_large", 3,
    ]  # fmt: skip
    assert results[4]["duplicate"] is True
    assert results[1]["errors"].keys() == {"content"}


def test_a_batch_may_be_large_but_not_larger(daemon: Daemon, conversation: int) -> None:
    many = [{"conversation_id": conversation, "sender_id": 1, "content": "x" * 1000}] * 1000
    answer = daemon.request("POST", f"{MESSAGES}/batch", {"messages": many})
    assert [result["seq"] for result in answer.json["results"]] == list(range(1, 1001))
    too_many = daemon.request("POST", f"{MESSAGES}/batch", {"messages": many + many[:1]})
    assert (too_many.status, list(too_many.json["errors"])) == (422, ["messages"])
    for path, most in ((f"{MESSAGES}/batch", 4 * 1024 * 1024), (MESSAGES, 256 * 1024)):
        # Refused by its announced length, before a byte of it is sent.
        connection = HTTPConnection("127.0.0.1", daemon.api_port, timeout=10)
        connection.putrequest("POST", path)
        connection.putheader("X-Internal-Token", daemon.token)
        connection.putheader("Content-Length", str(most + 1))
        connection.endheaders()
        refused = connection.getresponse()
        assert (refused.status, json.loads(refused.read())["code"]) == (413, "too_large")
        connection.close()


def test_edit_and_delete_by_id(daemon: Daemon, conversation: int) -> None:
    stored = daemon.post(conversation, 1, "helo", meta={"a": 1})
    path = f"{MESSAGES}/{stored['id']}"
    edited = daemon.request("PATCH", path, {"content": "hello"})
    assert edited.json == {"id": stored["id"], "status": "ok", "seq": 2}
    bare = daemon.request("PATCH", path, {"meta": None})
    assert bare.json["seq"] == 3
    (message,) = daemon.get(f"/api/ws/conversations/{conversation}/messages").json["messages"]
    assert (message["content"], message["meta"], message["seq"]) == ("hello", None, 1)
    nothing = daemon.request("PATCH", path, {})
    assert (nothing.status, list(nothing.json["errors"])) == (422, ["content"])
    assert daemon.request("DELETE", path).json["seq"] == 4
    assert daemon.request("DELETE", path).status == 404
    (message,) = daemon.get(f"/api/ws/conversations/{conversation}/messages").json["messages"]
    assert message["content"] is None
    assert message["deleted_at"]


def test_history_pages_and_refuses_what_is_no_page(daemon: Daemon, conversation: int) -> None:
    ids = [daemon.post(conversation, 1, str(n))["id"] for n in range(5)]
    path = f"/api/ws/conversations/{conversation}/messages"
    page = daemon.get(f"{path}?limit=2").json
    assert ([m["id"] for m in page["messages"]], page["has_more"]) == (ids[3:], True)
    page = daemon.get(f"{path}?after={ids[0]}&limit=2").json
    assert ([m["id"] for m in page["messages"]], page["has_more"]) == (ids[1:3], True)
    for query in ("limit=0", "limit=101", "limit=x", "before=-1", "after=x", "before=1&after=2"):
        assert daemon.get(f"{path}?{query}").status == 422, query
    assert daemon.get(f"/api/ws/conversations/{conversation + 10**6}/messages").json == {
        "messages": [],
        "has_more": False,
    }


def test_paths_and_methods_that_do_not_exist(daemon: Daemon) -> None:
    assert daemon.get("/api/ws/nothing").status == 404
    assert daemon.get("/api/ws/nothing").json["code"] == "not_found"
    wrong = daemon.request("DELETE", MESSAGES)
    assert (wrong.status, set(wrong.headers["Allow"].split(", "))) == (405, {"POST", "OPTIONS"})


def test_health_and_openapi_are_open(daemon: Daemon) -> None:
    def get(path: str) -> Any:
        return daemon.request("GET", path, headers={"X-Internal-Token": ""})

    assert get("/healthz").json == {"status": "ok"}
    assert get("/readyz").json == {"status": "ok", "checks": {"database": "ok", "migrations": "ok"}}
    assert b"chatd_connections" in get("/metrics").body
    described = get("/openapi.json").json
    paths = described["paths"]
    assert set(paths) == {
        "/api/ws/messages",
        "/api/ws/messages/batch",
        "/api/ws/messages/{message_id}",
        "/api/ws/messages/{message_id}/delivery",
        "/api/ws/conversations/{conversation_id}",
        "/api/ws/conversations/{conversation_id}/messages",
        "/api/ws/conversations/{conversation_id}/members/{user_id}",
        "/api/ws/conversations/{conversation_id}/events",
        "/api/ws/users/{user_id}",
        "/api/ws/users/{user_id}/ban",
        "/api/ws/users/{user_id}/disconnect",
        "/api/ws/users/{user_id}/revoke",
        "/api/ws/tokens",
        "/healthz",
        "/readyz",
    }
    posted = paths[MESSAGES]["post"]["requestBody"]["content"]["application/json"]["schema"]
    name = posted["$ref"].removeprefix("#/components/schemas/")
    assert described["components"]["schemas"][name]["required"] == ["conversation_id", "sender_id", "content"]


async def test_members_only_may_enter_and_leave_no_trace_to_others(daemons: Daemons) -> None:
    """G6, and `not_found` for what is not there and what is not yours alike."""
    daemon = await in_thread(lambda: daemons(rooms__access="members"))
    await in_thread(daemon.post, 1, 1, "by ada")
    async with login(daemon, 2) as grace, login(daemon, 1, {"1": 0}) as ada:
        foreign = await grace.request("subscribe", conversation_id=1, after=0)
        missing = await grace.request("subscribe", conversation_id=2, after=0)
        assert {k: v for k, v in foreign.items() if k != "ref"} == {
            k: v for k, v in missing.items() if k != "ref"
        }
        assert foreign["code"] == "not_found"
        for event, fields in (("history", {}), ("send", {"content": "x"})):
            assert (await grace.request(event, conversation_id=1, **fields))["code"] == "not_found"
        theirs, nobodys = [await grace.request("delete", conversation_id=1, id=id) for id in (1, 999)]
        assert theirs | {"ref": 0} == nobodys | {"ref": 0}

        await in_thread(daemon.request, "PUT", "/api/ws/conversations/1/members/2", {"role": "guest"})
        assert await ada.expect("member") == {
            "event": "member", "conversation_id": 1, "user_id": 2, "change": "added", "role": "guest",
        }  # fmt: skip
        entered = await grace.request("subscribe", conversation_id=1, after=0)
        assert [c["content"] for c in entered["changes"]] == ["by ada"]

        await in_thread(daemon.request, "DELETE", "/api/ws/conversations/1/members/2")
        ended = await grace.expect("unsubscribed", patience=1)
        assert (ended["conversation_id"], ended["code"]) == (1, "not_found")
        assert (await ada.expect("member"))["change"] == "removed"
        await in_thread(daemon.post, 1, 1, "not for grace")
        assert (await grace.request("subscribe", conversation_id=1, after=0))["code"] == "not_found"
        assert not [e for e in grace.received if e["event"] == "message"]


async def test_a_removed_user_comes_back_only_by_put(daemons: Daemons) -> None:
    daemon = await in_thread(lambda: daemons(rooms__access="open"))
    await in_thread(daemon.request, "DELETE", "/api/ws/conversations/1/members/2")
    token = await in_thread(lambda: daemon.token_for(2, conversations=[1]))
    async with login(daemon, 2, token=token) as grace:
        assert (await grace.request("subscribe", conversation_id=1))["code"] == "not_found"
        await in_thread(daemon.post, 1, 2, "the backend may speak for her")
        assert (await grace.request("subscribe", conversation_id=1))["code"] == "not_found"
        await in_thread(daemon.request, "PUT", "/api/ws/conversations/1/members/2")
        assert (await grace.request("subscribe", conversation_id=1))["seq"] == 1


async def test_a_token_may_list_rooms(daemons: Daemons) -> None:
    daemon = await in_thread(lambda: daemons(rooms__access="members"))
    token = await in_thread(lambda: daemon.token_for(2, conversations=[5]))
    async with login(daemon, 2, {"5": None, "6": None}, token=token) as grace:
        assert list(grace.ready["rooms"]) == ["5"]  # type: ignore[attr-defined]
        ended = await grace.expect("unsubscribed")
        assert (ended["conversation_id"], ended["code"]) == (6, "not_found")
        assert (await grace.request("send", conversation_id=5, content="x"))["seq"] == 1


async def test_a_mute_silences_until_it_ends(daemons: Daemons) -> None:
    daemon = await in_thread(lambda: daemons(rooms__access="members"))
    path = "/api/ws/conversations/1/members/2"
    await in_thread(daemon.request, "PUT", path, {"muted_until": "2999-01-01T00:00:00Z"})
    async with login(daemon, 2, {"1": None}) as grace:
        refused = await grace.request("send", conversation_id=1, content="x")
        assert (refused["code"], refused["until"]) == ("muted", "2999-01-01T00:00:00.000000Z")
        await in_thread(daemon.request, "PUT", path, {"muted_until": None})
        assert (await grace.request("send", conversation_id=1, content="x"))["event"] == "ok"
    bad = await in_thread(daemon.request, "PUT", path, {"muted_until": "soon"})
    assert (bad.status, list(bad.json["errors"])) == (422, ["muted_until"])


def test_tokens_are_given_for_users(daemon: Daemon) -> None:
    answer = daemon.request("POST", "/api/ws/tokens", {"user_id": 5, "ttl": 60})
    assert answer.json["expires_in"] == 60
    wrong = daemon.request("POST", "/api/ws/tokens", {"user_id": 0, "ttl": 0})
    assert set(wrong.json["errors"]) == {"user_id", "ttl"}


async def test_a_revoked_user_is_sent_away_and_stays_away(daemons: Daemons) -> None:
    """`chat_users` counts for live connections within a sweep, and for every login after."""
    import sqlite3

    daemon = await in_thread(daemons)
    token = await in_thread(daemon.token_for, 2)
    async with login(daemon, 2, token=token) as grace:
        with sqlite3.connect(daemon.directory / "chatd.db") as connection:
            connection.execute("INSERT INTO chat_users (user_id, valid_after) VALUES (2, 4102444800)")
        connection.close()
        assert (await grace.closed(patience=12))[0] == 4503
    from tests.client import connect

    async with connect(daemon.ws_url) as client:
        await client.next()
        await client.send("auth", ref=1, token=token)
        assert (await client.next())["code"] == "unauthorized"
        assert (await client.closed())[0] == 4503


def upgrade(*headers: bytes) -> bytes:
    lines = [b"GET /healthz HTTP/1.1", b"Host: x", *headers]
    return b"\r\n".join(lines) + b"\r\n\r\n"


WEBSOCKET = (
    *(b"Connection: Upgrade", b"Upgrade: websocket", b"Sec-WebSocket-Version: 13"),
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==",
)


@pytest.mark.parametrize(
    ("words", "status"),
    [
        # RFC 7540 §3.2.1: SETTINGS with a maximum of 100 streams and a window of 65,535 bytes
        (
            upgrade(
                b"Connection: Upgrade, HTTP2-Settings", b"Upgrade: h2c", b"HTTP2-Settings: AAMAAABkAAQAAP__"
            ),
            200,
        ),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0]), 505),
        (upgrade(*WEBSOCKET), 200),
    ],
    ids=["h2c", "HTTP/2", "WebSocket"],
)
def test_the_api_speaks_no_other_protocol(daemon: Daemon, words: bytes, status: int) -> None:
    """A request that offers another one is answered as if it did not."""
    with socket.create_connection(("127.0.0.1", daemon.api_port), timeout=5) as peer:
        peer.sendall(words)
        peer.shutdown(socket.SHUT_WR)
        answer = b""
        while data := peer.recv(65536):
            answer += data
    assert int(answer.split()[1]) == status
    assert '"exception"' not in daemon.log


SETTINGS = Settings(Config(api=Api(internal_token="t")))
WHOLE = b'{"conversation_id":1,"sender_id":1,"content":"a private text"}'

# The one route that is answered past Quart: what a request can do wrong before it is one.


async def _hot(*events: dict[str, Any], headers: dict[str, str] | None = None) -> tuple[int, Any]:
    """The status and the body that these ASGI events are answered with."""
    given = {"x-internal-token": "t"} | (headers or {})
    scope = {"headers": [(name.encode(), value.encode()) for name, value in given.items()]}
    waiting = list(events)
    sent: list[dict[str, Any]] = []

    async def receive() -> dict[str, Any]:
        if not waiting:
            await trio.sleep_forever()
        return waiting.pop(0)

    async def send(event: dict[str, Any]) -> None:
        sent.append(event)

    await Post(None, SETTINGS)(scope, receive, send)  # type: ignore[arg-type]  # nothing gets as far as the chat
    return sent[0]["status"], json.loads(sent[1]["body"])


async def test_a_body_that_never_ends_is_given_up(autojump_clock: trio.testing.MockClock) -> None:
    status, body = await _hot({"type": "http.request", "body": b'{"conv', "more_body": True})
    assert (status, body["code"]) == (408, "bad_request")
    assert trio.current_time() == pytest.approx(BODY_SECONDS, abs=1)


async def test_a_body_without_a_length_is_bounded() -> None:
    part = {"type": "http.request", "body": b"x" * 100_000, "more_body": True}
    status, body = await _hot(part, part, part)
    assert (status, body["code"]) == (413, "too_large")
    status, body = await _hot(headers={"content-length": str(BODY_BYTES + 1)})
    assert (status, body["code"]) == (413, "too_large"), "before any of it is read"


async def test_a_body_that_breaks_off_is_refused() -> None:
    part = {"type": "http.request", "body": b"{", "more_body": True}
    status, body = await _hot(part, {"type": "http.disconnect"})
    assert (status, body["code"]) == (400, "bad_request")


async def test_an_unforeseen_error_is_an_incident() -> None:
    with structlog.testing.capture_logs() as lines:
        status, body = await _hot({"type": "http.request", "body": WHOLE})
    assert (status, body["code"]) == (500, "internal")
    assert [(line["event"], line["incident"]) for line in lines] == [("request_failed", body["incident"])]


@pytest.mark.service
@pytest.mark.parametrize("form", ["text", "json"])
def test_a_traceback_in_the_log_shows_nothing_of_a_message(form: str) -> None:
    code = f"""
import trio
from chatd.api.routes.post_message import Post
from chatd.config.options import Api, Config
from chatd.config.settings import Settings
from chatd.observe import logs

async def receive():
    return {{"type": "http.request", "body": {WHOLE!r}}}

logs.configure("info", {form!r})
settings = Settings(Config(api=Api(internal_token="t")))
headers = {{"headers": [(b"x-internal-token", b"t")]}}
trio.run(Post(None, settings), headers, receive, lambda event: trio.sleep(0))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stderr
    assert "request_failed" in said
    assert "in _post" in said
    assert "a private text" not in said
