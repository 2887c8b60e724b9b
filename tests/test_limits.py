"""What the daemon grants and no more: connections, rates, time, origins, memory; and who may listen where.

Every refusal is asserted as the contract names it: HTTP status, error code or close code.
"""

from __future__ import annotations

import json
import resource
import socket
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from trio_websocket import ConnectionRejected, wrap_client_stream

from chatd.store.engine import SQLITE_WRITER_CACHE
from tests.client import Client, awake, connect, login
from tests.conftest import Daemons
from tests.daemon import Daemon

SECRET = "a secret of more than forty-eight characters for HS384"
AUTH, PING, PONG = 0.6, 0.4, 0.4  # seconds: the daemon's patience
GRACE = 2.0  # seconds past the end of a token
SLACK = 3.0  # seconds of ours on top of every deadline, for a busy machine
ROOMS, CONNECTIONS, SENDS = 3, 2, 1
MEGABYTE = 1024 * 1024
OUTBOX_LIMIT = MEGABYTE
UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: a\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One that allows little."""
    strict = Daemon(
        tmp_path_factory.mktemp("daemon"),
        auth__secret=SECRET,
        hub__auth_timeout=AUTH,
        limits__connections_per_user=CONNECTIONS,
        limits__rooms_per_connection=ROOMS,
        limits__sends_per_second=SENDS,
    )
    try:
        yield strict.start()
    finally:
        strict.close()


@pytest.fixture(scope="module")
def watchful(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One that soon asks for a sign of life."""
    watching = Daemon(
        tmp_path_factory.mktemp("daemon"),
        hub__allow_query_token="true",
        hub__ping_interval=PING,
        hub__ping_timeout=PONG,
    )
    try:
        yield watching.start()
    finally:
        watching.close()


_next_user = iter(range(100, 10**6))


@pytest.fixture
def user() -> int:
    """A user nobody else is, with limits of its own."""
    return next(_next_user)


def token(user_id: Any, ttl: float = 3600, **claims: Any) -> str:
    moment = time.time()
    return jwt.encode({"sub": user_id, "iat": moment, "exp": moment + ttl} | claims, SECRET, "HS256")


async def refusal(daemon: Daemon, **headers: str) -> ConnectionRejected | None:
    """How the handshake is refused; None if it is not."""
    try:
        async with connect(daemon.ws_url, extra_headers=as_bytes(headers)):
            return None
    except* ConnectionRejected as group:
        error: BaseException = group
        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
    assert isinstance(error, ConnectionRejected)
    return error


def as_bytes(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]


def assert_overloaded(refused: ConnectionRejected | None) -> None:
    assert refused is not None
    assert refused.status_code == 503
    assert int(dict(refused.headers)[b"retry-after"]) > 0


# How many.


async def test_a_user_has_so_many_connections_and_no_more(daemon: Daemon, user: int) -> None:
    async with login(daemon, user) as first, login(daemon, user) as second:
        async with awake(first, second), connect(daemon.ws_url) as third:
            await third.send("auth", ref=1, token=token(str(user)))
            assert (await third.closed())[0] == 4504
        async with login(daemon, user + 10**6):  # others are not counted
            pass
        assert (await first.request("ping"))["event"] == "pong"
    async with login(daemon, user):  # there is room again
        pass


async def test_connections_in_all_are_limited(daemons: Daemons) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, limits__connections=2))
    async with connect(daemon.ws_url), connect(daemon.ws_url):
        assert_overloaded(await refusal(daemon))
    await until_accepted(daemon)


async def test_connections_of_an_address_are_limited(daemons: Daemons) -> None:
    """Behind a trusted proxy the address is the last one it names, whoever else named one before."""
    settings = {"limits__connections_per_address": 2, "limits__trusted_proxies": "127.0.0.1"}
    daemon = await trio.to_thread.run_sync(partial(daemons, **settings))
    ours = [(b"X-Forwarded-For", b"198.51.100.7")]
    async with connect(daemon.ws_url, extra_headers=ours), connect(daemon.ws_url, extra_headers=ours):
        assert_overloaded(await refusal(daemon, X_Forwarded_For="198.51.100.7"))
        assert_overloaded(await refusal(daemon, X_Forwarded_For="203.0.113.1, 198.51.100.7"))
        assert await refusal(daemon, X_Forwarded_For="198.51.100.8") is None
    await until_accepted(daemon, X_Forwarded_For="198.51.100.7")


async def test_a_connection_counts_until_its_descriptor_is_free(daemons: Daemons) -> None:
    """Its goodbye is said, and it goes on sending: as long as that is read it has its place."""
    daemon = await trio.to_thread.run_sync(partial(daemons, limits__connections_per_address=1))
    peer = await trio.open_tcp_stream("127.0.0.1", daemon.hub_port)
    async with peer:
        await peer.send_all(UPGRADE)
        assert b" 101 " in await peer.receive_some()
        await peer.send_all(b"\x82\x81\0\0\0\0x")  # a binary frame, which the server ends with 4501
        with trio.fail_after(2 * SLACK):
            async for _ in peer:  # its goodbye, and the end of its half
                pass
        await peer.send_all(b"x")
        assert_overloaded(await refusal(daemon))
    await until_accepted(daemon)


async def test_who_is_no_trusted_proxy_names_no_address(daemons: Daemons) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, limits__connections_per_address=1))
    async with connect(daemon.ws_url):
        assert_overloaded(await refusal(daemon, X_Forwarded_For="198.51.100.7"))


async def until_accepted(daemon: Daemon, **headers: str) -> None:
    """The daemon hears of a hanging up a moment after it happened."""
    with trio.fail_after(SLACK):
        while await refusal(daemon, **headers) is not None:
            pass


async def test_handshakes_have_a_rate(daemons: Daemons) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, limits__handshakes_per_second=2))
    refused: list[ConnectionRejected | None] = []

    async def shake_hands() -> None:
        refused.append(await refusal(daemon))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(shake_hands)
    assert 4 <= refused.count(None) <= 8  # twice the rate at once, and what a slow machine had time for
    for one in filter(None, refused):
        assert_overloaded(one)
    await until_accepted(daemon)


async def test_a_connection_is_in_so_many_rooms_and_no_more(
    daemon: Daemon, user: int, conversation: int
) -> None:
    rooms = [conversation + 10**7 + n for n in range(ROOMS + 1)]
    async with login(daemon, user, dict.fromkeys(rooms[:ROOMS])) as ada:
        refused = await ada.request("subscribe", conversation_id=rooms[ROOMS])
        assert (refused["event"], refused["code"], refused["retryable"]) == ("error", "limit_exceeded", False)
        assert (await ada.request("subscribe", conversation_id=rooms[0]))["event"] == "subscribed"
        await ada.request("unsubscribe", conversation_id=rooms[0])
        assert (await ada.request("subscribe", conversation_id=rooms[ROOMS]))["event"] == "subscribed"
    graces = token(user)  # before the connection, which has little time to bring it
    async with connect(daemon.ws_url) as grace:
        await grace.expect("hello")
        await grace.send("auth", ref=1, token=graces, rooms=dict.fromkeys(rooms))
        ready = await grace.expect("ready")  # the first of them; one too many is no reason to keep a client out
        assert list(ready["rooms"]) == [str(room) for room in rooms[:ROOMS]]
        refused = await grace.expect("unsubscribed")
        assert (refused["conversation_id"], refused["code"]) == (rooms[ROOMS], "limit_exceeded")
        await grace.silence()


async def test_an_inbox_takes_no_room_from_others_and_gives_none(
    daemon: Daemon, user: int, conversation: int
) -> None:
    mine = [conversation * 1000 + number for number in range(ROOMS + 2)]
    for room in mine:
        await trio.to_thread.run_sync(daemon.post, room, user, "mine")
    token = await trio.to_thread.run_sync(daemon.token_for, user)
    async with login(daemon, user, "*", token=token) as client:
        assert len(client.ready["rooms"]) == ROOMS + 2  # type: ignore[attr-defined]
        others = [conversation * 1000 + 100 + number for number in range(ROOMS + 1)]
        for room in others[:ROOMS]:
            assert (await client.request("subscribe", conversation_id=room))["event"] == "subscribed"
        for _ in range(3):
            refused = await client.request("subscribe", conversation_id=others[ROOMS])
            assert (refused["event"], refused["code"]) == ("error", "limit_exceeded")
            await client.request("unsubscribe", conversation_id=mine[0])
            assert (await client.request("auth", token=token, rooms="*"))["event"] == "ready"


async def test_sends_have_a_rate_and_who_does_not_heed_it_is_sent_away(
    daemon: Daemon, user: int, conversation: int
) -> None:
    async with login(daemon, user, {conversation: None}) as ada:
        for number in range(2 * SENDS):
            assert (await ada.request("send", conversation_id=conversation, content=f"{number}"))["seq"]
        refused = await ada.request("send", conversation_id=conversation, content="too soon")
        assert (refused["code"], refused["retryable"]) == ("rate_limited", True)
        assert 0 < refused["retry_after"] <= 1 / SENDS
        await trio.sleep(refused["retry_after"])  # a client that heeds it
        assert (await ada.request("send", conversation_id=conversation, content="in time"))["event"] == "ok"

        for _ in range(150):
            await ada.send("send", conversation_id=conversation, content="!")
        assert (await ada.closed())[0] == 4006
    stored = await history(daemon, conversation)
    assert "too soon" not in stored
    assert stored.count("!") <= 2


async def history(daemon: Daemon, conversation: int) -> list[str]:
    path = f"/api/ws/conversations/{conversation}/messages?limit=100"
    return [m["content"] for m in (await trio.to_thread.run_sync(daemon.get, path)).json["messages"]]


async def test_the_rate_is_the_users_on_all_connections(daemon: Daemon, user: int, conversation: int) -> None:
    async with login(daemon, user) as one, login(daemon, user) as other:
        answers = [
            await client.request("send", conversation_id=conversation, content="hi")
            for client in (one, other, one)
        ]
        assert [answer["event"] for answer in answers] == ["ok", "ok", "error"]


@pytest.mark.parametrize("event", ["ping", "dance"])
async def test_every_request_has_one_reply_also_beyond_the_rate(daemon: Daemon, user: int, event: str) -> None:
    async with login(daemon, user) as ada:
        asked = 350  # 300 at once are allowed
        for number in range(asked):
            await ada.send(event, ref=f"r{number}")
        await ada.send("ping", ref="last")
        replies = [await ada.next()]
        while replies[-1].get("ref") != "last":
            replies.append(await ada.next())
        assert [reply["ref"] for reply in replies[:-1]] == [f"r{n}" for n in range(asked)]
        assert "rate_limited" in {reply.get("code") for reply in replies}


# Who.


@pytest.mark.parametrize(
    ("origins", "origin", "host", "allowed"),
    [
        ("", "http://chat.example", "chat.example", True),
        ("", "https://chat.example:8443", "chat.example:6001", True),
        ("", "http://CHAT.example", "chat.example", True),
        ("", "http://[::1]:3000", "[::1]:6001", True),
        ("", "http://evil.example", "chat.example", False),
        ("", "http://chat.example.evil.example", "chat.example", False),
        ("", "http://evil.example@chat.example.evil.example", "chat.example", False),
        ("", "null", "chat.example", False),
        ("", "", "chat.example", False),
        ("", "http://[", "chat.example", False),
        ("https://app.example", "https://app.example", "chat.example", True),
        ("https://app.example", "http://app.example", "chat.example", False),
        ("https://app.example", "https://app.example:8443", "chat.example", False),
        ("https://app.example", "https://chat.example", "chat.example", False),
    ],
)
async def test_browsers_come_from_our_origins_alone(
    origin_daemons: dict[str, Daemon], origins: str, origin: str, host: str, allowed: bool
) -> None:
    assert await status_of_upgrade(origin_daemons[origins], host, origin) == (101 if allowed else 403)


async def test_programs_have_no_origin_and_may_come(origin_daemons: dict[str, Daemon]) -> None:
    for daemon in origin_daemons.values():
        assert await refusal(daemon) is None


@pytest.fixture(scope="module")
def origin_daemons(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Daemon]]:
    """By their `hub.origins`."""
    configured = Daemon(tmp_path_factory.mktemp("daemon"), hub__origins="https://app.example")
    try:
        yield {"": daemon, "https://app.example": configured.start()}
    finally:
        configured.close()


async def status_of_upgrade(daemon: Daemon, host: str, origin: str) -> int:
    """The answer to a handshake for a host of any name: the client library sends the one it connected to."""
    lines = [f"Origin: {origin}", "Connection: Upgrade", "Upgrade: websocket"]
    return int((await answer_to_upgrade(daemon, host, *lines)).split()[1])


async def answer_to_upgrade(daemon: Daemon, host: str, *lines: str) -> str:
    """The head of the answer to a handshake with these lines."""
    head = [f"GET /ws HTTP/1.1\r\nHost: {host}", *lines]
    head += ["Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==", "Sec-WebSocket-Version: 13"]
    with trio.fail_after(SLACK):
        async with await trio.open_tcp_stream("127.0.0.1", daemon.hub_port) as stream:
            await stream.send_all("\r\n".join([*head, "", ""]).encode())
            answer = b""
            while b"\r\n\r\n" not in answer:
                answer += await stream.receive_some()
    return answer.partition(b"\r\n\r\n")[0].decode()


WANTED = ("Connection: Upgrade", "Upgrade: websocket")
SUBPROTOCOL = "Sec-WebSocket-Protocol:"


@pytest.mark.parametrize(
    ("lines", "chosen"),
    [
        (("Connection: Upgrade", "Connection: keep-alive", "Upgrade: websocket"), None),
        (("Connection: keep-alive", "Connection: Upgrade", "Upgrade: websocket"), None),
        (("Connection: Upgrade", "Upgrade: WebSocket, h2c"), None),
        (("Connection: Upgrade", "Upgrade: websocket", "Upgrade: h2c"), None),
        ((*WANTED, f"{SUBPROTOCOL} other", f"{SUBPROTOCOL} chatd.v1"), "chatd.v1"),
        ((*WANTED, f"{SUBPROTOCOL} chatd.v1", f"{SUBPROTOCOL} other"), "chatd.v1"),
        ((*WANTED, f"{SUBPROTOCOL}", f"{SUBPROTOCOL} a,,chatd.v1"), "chatd.v1"),
        ((*WANTED, f"{SUBPROTOCOL} "), None),
    ],
)
async def test_lines_of_a_list_header_are_one_list(
    daemon: Daemon, lines: tuple[str, ...], chosen: str | None
) -> None:
    answer = await answer_to_upgrade(daemon, "a", *lines)
    assert answer.split()[1] == "101"
    named = [line.split(": ")[1] for line in answer.split("\r\n") if line.startswith(SUBPROTOCOL)]
    assert named == ([chosen] if chosen else [])


async def test_a_header_that_comes_twice_and_is_no_list_fits_nothing(daemon: Daemon) -> None:
    """A proxy may have judged another line than we would."""
    for origins in (("http://evil.example", "http://a"), ("http://a", "http://evil.example")):
        lines = [f"Origin: {origin}" for origin in origins]
        assert (await answer_to_upgrade(daemon, "a", *WANTED, *lines)).split()[1] == "403"
    token = await trio.to_thread.run_sync(daemon.token_for, 7)
    twice = [(b"Authorization", f"Bearer {one}".encode()) for one in ("other", token)]
    async with connect(daemon.ws_url, extra_headers=twice) as client:
        assert (await client.closed())[0] == 4500


async def test_another_subprotocol_is_accepted_and_closed(daemon: Daemon) -> None:
    async with connect(daemon.ws_url, subprotocols=["chatd.v9"]) as client:
        assert (await client.closed())[0] == 4506
    async with connect(daemon.ws_url, subprotocols=["chatd.v9", "chatd.v1"]) as client:
        assert client.ws.subprotocol == "chatd.v1"
        assert (await client.next())["event"] == "hello"


async def test_who_does_not_authenticate_is_sent_away(daemon: Daemon) -> None:
    async with connect(daemon.ws_url) as client:
        assert (await client.next())["auth_timeout"] == AUTH
        started = trio.current_time()
        refused = await client.request("send", conversation_id=1, content="x")
        assert refused["code"] == "unauthorized"
        await client.request("ping")
        assert (await client.closed(AUTH + SLACK))[0] == 4004  # the way may have been slow: not for good
        assert trio.current_time() - started > AUTH / 2


@pytest.mark.parametrize(
    "bad",
    [
        pytest.param("", id="none"),
        pytest.param("nonsense", id="no token"),
        pytest.param("caf\u00e9.\U0001f600.x", id="no ascii"),
        pytest.param("a" * 9000, id="too long"),
        pytest.param(jwt.encode({"sub": "1", "exp": 2**33}, "x" * 32, "HS256"), id="another secret"),
        pytest.param(jwt.encode({"sub": "1", "exp": 2**33}, None, "none"), id="no signature"),
        pytest.param(jwt.encode({"sub": "1", "exp": 2**33}, SECRET, "HS384"), id="another algorithm"),
        pytest.param(jwt.encode({"sub": "1"}, SECRET, "HS256"), id="no end"),
        pytest.param(jwt.encode({"sub": "1", "exp": 1e999}, SECRET, "HS256"), id="no end in sight"),
        pytest.param(jwt.encode({"sub": "1", "exp": "soon"}, SECRET, "HS256"), id="an end that is no time"),
        pytest.param(jwt.encode({"exp": 2**33}, SECRET, "HS256"), id="nobody's"),
        pytest.param(token("0"), id="user 0"),
        pytest.param(token(2**53), id="a user beyond the last"),
        pytest.param(token(True), id="a user that is a truth"),
        pytest.param(token("1", conversations=["one"]), id="rooms that are no ids"),
        pytest.param(token("1", nbf=time.time() + 3600), id="not yet valid"),
    ],
)
async def test_an_invalid_token_is_refused_for_good(daemon: Daemon, bad: str) -> None:
    async with connect(daemon.ws_url) as client:
        await client.send("auth", ref=1, token=bad)
        error = await client.expect("error")
        assert (error["ref"], error["code"], error["retryable"]) == (1, "unauthorized", False)
        assert (await client.closed())[0] == 4500


# How long.


async def test_an_expired_token_is_refused_until_there_is_a_new_one(daemon: Daemon, user: int) -> None:
    async with connect(daemon.ws_url) as client:
        await client.send("auth", ref=1, token=token(user, ttl=-10))
        error = await client.expect("error")
        assert (error["ref"], error["code"]) == (1, "token_expired")
        assert (await client.closed())[0] == 4001
    bearer = [(b"Authorization", b"Bearer " + token(user, ttl=-10).encode())]
    async with connect(daemon.ws_url, extra_headers=bearer) as client:
        await client.expect("error", code="token_expired")
        assert (await client.closed())[0] == 4001


async def test_a_connection_lives_as_long_as_its_token(daemon: Daemon, user: int) -> None:
    async with connect(daemon.ws_url) as client:
        expires = time.time() + 1
        ready = await client.request("auth", token=token(user, ttl=1))
        assert ready["expires_in"] <= 1
        assert (await client.closed(1 + GRACE + SLACK))[0] == 4001
        assert time.time() >= expires - 0.1


async def test_a_fresh_token_extends_a_connection(daemon: Daemon, user: int) -> None:
    async with connect(daemon.ws_url) as client:
        await client.request("auth", token=token(user, ttl=1))
        refreshed = await client.request("refresh", token=token(user, ttl=60))
        assert (refreshed["event"], refreshed["expires_in"] > 50) == ("ok", True)
        await trio.sleep(1.3)  # past the end of the first token
        assert (await client.request("ping"))["event"] == "pong"


async def test_a_connection_stays_its_users(daemon: Daemon, user: int) -> None:
    async with connect(daemon.ws_url) as client:
        await client.request("auth", token=token(user))
        for event in ("refresh", "auth"):
            refused = await client.request(event, token=token(user + 10**6))
            assert (refused["event"], refused["code"], refused["field"]) == ("error", "forbidden", "token")
        assert (await client.request("auth", token=token(user)))["user_id"] == user


@pytest.mark.service
async def test_a_client_that_gives_no_sign_of_life_is_given_up(watchful: Daemon) -> None:
    async with login(watchful, 1) as silent, login(watchful, 2) as lively, trio.open_nursery() as nursery:
        started = trio.current_time()
        nursery.start_soon(answer_pings, lively)
        assert (await silent.closed(PING + PONG + SLACK))[0] == 4000
        assert trio.current_time() - started >= PING + PONG - 0.1
        assert "ping" in [event["event"] for event in silent.received]
        await trio.sleep(PING + PONG)  # twice the time that was too long for the other
        nursery.cancel_scope.cancel()
        assert (await lively.request("ping"))["event"] == "pong"


async def answer_pings(client: Client) -> None:
    while True:
        if (await client.next())["event"] == "ping":
            await client.send("pong")


@pytest.mark.service
async def test_a_trivial_client_is_kept_by_websocket_pings(watchful: Daemon, conversation: int) -> None:
    """Its library answers them; it knows nothing of ours."""
    query = f"?token={watchful.token_for(1)}&conversation_id={conversation}"
    async with connect(watchful.ws_url + query) as trivial:
        await trio.sleep(2 * (PING + PONG))  # more than twice the time that silence is given
        await trio.to_thread.run_sync(watchful.post, conversation, 2, "still there")
        assert (await trivial.next())["content"] == "still there"


# How much: G8.

BATCH, SIZE, BATCHES, SLOW = 60, 8000, 50, 5  # 24 MB, more than the kernel holds for anybody


async def test_a_slow_reader_costs_bounded_memory_and_delays_nobody(
    daemons: Daemons, conversation: int
) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, limits__sends_per_second=0))
    async with login(daemon, 1, {conversation: None}) as prompt, AsyncExitStack() as stack:
        # What the daemon needs for this without slow readers, the pages among it that the database keeps.
        for _ in range(2 + SQLITE_WRITER_CACHE * 1024 // (BATCH * SIZE)):
            await traffic(daemon, conversation, prompt)
        before = memory(daemon)
        for user_id in range(2, 2 + SLOW):
            await stack.enter_async_context(slow_reader(daemon, user_id, conversation))
        most = 0
        for _ in range(BATCHES):
            await traffic(daemon, conversation, prompt)
            most = max(most, memory(daemon) - before)
        assert most < (SLOW + 4) * OUTBOX_LIMIT
        assert (await prompt.request("ping"))["event"] == "pong"


async def test_a_burst_of_more_than_an_outbox_keeps_who_reads(daemon: Daemon, conversation: int) -> None:
    """One batch of a backend: what the outbox has no room for comes as the reader takes it."""
    count = 2 * OUTBOX_LIMIT // SIZE
    async with login(daemon, 1, {conversation: None}) as prompt, trio.open_nursery() as nursery:
        nursery.start_soon(post, daemon, conversation, count)
        event = await prompt.next()
        while event.get("seq") != count:
            event = await prompt.next()
        assert event["event"] in ("message", "subscribed")
        assert (await prompt.request("ping"))["event"] == "pong"


async def traffic(daemon: Daemon, conversation: int, prompt: Client) -> None:
    """Half a megabyte for the room. Who reads has it all at once."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(post, daemon, conversation, BATCH)
        messages = await prompt.messages(BATCH, patience=SLACK)
    first = messages[0]["seq"]
    assert [m["seq"] for m in messages] == list(range(first, first + BATCH))


async def post(daemon: Daemon, conversation: int, count: int) -> None:
    body = {"conversation_id": conversation, "sender_id": 1, "content": "x" * SIZE}
    batch = partial(daemon.request, "POST", "/api/ws/messages/batch", {"messages": [body] * count})
    assert (await trio.to_thread.run_sync(batch)).status == 200


@asynccontextmanager
async def slow_reader(daemon: Daemon, user_id: int, conversation: int) -> AsyncIterator[None]:
    """In the room, with little room of its own, and reading nothing from then on."""
    token = await trio.to_thread.run_sync(daemon.token_for, user_id)
    connection = trio.socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    await connection.connect(("127.0.0.1", daemon.hub_port))
    async with trio.SocketStream(connection) as stream:
        async with trio.open_nursery() as nursery:
            ws = await wrap_client_stream(nursery, stream, "127.0.0.1", "/ws")
            client = Client(ws)
            await client.request("auth", token=token, rooms={conversation: None})
            nursery.cancel_scope.cancel()  # the library's reader
        yield


def memory(daemon: Daemon) -> int:
    """Resident bytes of the daemon."""
    return int(Path(f"/proc/{daemon.pid}/statm").read_text().split()[1]) * resource.getpagesize()


# How it begins.


@pytest.mark.service
@pytest.mark.parametrize("key", ["api", "hub"])
def test_a_taken_port_is_said_in_a_sentence(tmp_path: Path, key: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        bind = f"127.0.0.1:{taken.getsockname()[1]}"
        ended = Daemon(tmp_path, **{f"{key}__bind": bind}).command("serve")
    assert ended.returncode == 1
    said = [line for line in ended.stderr.splitlines() if not _is_log(line)]
    assert len(said) == 1
    assert f"{key}.bind: cannot listen on {bind}" in said[0]
    assert ended.stdout == ""


def _is_log(line: str) -> bool:
    try:
        return bool(json.loads(line)["level"] == "info")
    except ValueError:
        return False
