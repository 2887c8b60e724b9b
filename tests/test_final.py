"""A final word (4500–4999) is for what is final: whatever time, or the next token, cures must not get one.

`Final` enumerates the ways into one. Each has a row in docs/errors.md that says why it is final, and a test
here that goes it; nothing else in the code may name such a code.
"""

from __future__ import annotations

import json
import re
import sqlite3
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ed25519

from chatd.auth.keyserver import UNKNOWN, KeyServer
from chatd.auth.tokens import AFTER, Tokens
from chatd.backend.fetch import Answer
from chatd.chat.logins import check_standing
from chatd.config import Auth
from chatd.core.errors import BadRequest, CallFailed, Close, Final, NotYet, Outdated, Revoked, Unauthorized
from chatd.core.model import Identity, timestamp
from chatd.store.read.lookups import Standing
from tests.backend import serving
from tests.client import Client, awake, connect, login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.test_auth import SECRET, jwk, sign

ROOT = Path(__file__).parent.parent
LEEWAY = Auth().leeway
in_thread = trio.to_thread.run_sync


async def end_of(daemon: Daemon, token: str) -> tuple[str, int]:
    """How a login goes: ("ready", 0), or the code of its error and of its close."""
    async with connect(daemon.ws_url) as client:
        answer = await client.request("auth", token=token)
        return ("ready", 0) if answer["event"] == "ready" else (answer["code"], (await client.closed())[0])


async def ask(daemon: Daemon, method: str, path: str, body: Any = None) -> Any:
    answer = await in_thread(daemon.request, method, f"/api/ws/{path}", body)
    assert answer.status == 200, answer.body
    return answer.json


def signed(**more: Any) -> str:
    """By a backend of its own, in whole seconds."""
    return sign("HS256", SECRET, iat=int(time.time()), **more)


# Revocations.


async def test_a_login_right_after_a_revocation_is_not_turned_away_for_good(daemons: Daemons) -> None:
    daemon = await in_thread(lambda: daemons(auth__secret=SECRET))
    old = sign("HS256", SECRET, iat=int(time.time()) - 60)
    for behind in (0, 0, 0, 2, 2):  # seconds that the backend's clock is behind
        await ask(daemon, "POST", "users/7/revoke")
        assert await end_of(daemon, old) == ("unauthorized", 4503)
        tries = 0
        while (end := await end_of(daemon, sign("HS256", SECRET, iat=int(time.time()) - behind))) != (
            "ready",
            0,
        ):
            assert end == ("token_expired", 4001)  # the next token is right
            tries += 1
            assert tries < 100
            await trio.sleep(0.1)
        assert await end_of(daemon, await in_thread(daemon.token_for, 7)) == ("ready", 0)


async def test_tokens_of_ours_are_told_apart_within_a_second(daemons: Daemons) -> None:
    daemon = await in_thread(daemons)
    for _ in range(5):
        before = await in_thread(daemon.token_for, 7)
        assert await end_of(daemon, before) == ("ready", 0)
        await ask(daemon, "POST", "users/7/revoke")
        after = await in_thread(daemon.token_for, 7)
        assert await end_of(daemon, before) == ("unauthorized", 4503)
        assert await end_of(daemon, after) == ("ready", 0)


def said(issued_at: float, **more: Any) -> Identity:
    return Identity(7, time.time() + 600, issued_at, frozenset(), **more)


def test_what_is_older_than_a_revocation_and_what_may_not_be() -> None:
    now = int(time.time())

    def verdict(identity: Identity, after: int, *, live: bool = False) -> type[Exception] | None:
        try:
            check_standing(identity, Standing(after), LEEWAY, live=live)
        except (Revoked, Outdated) as error:
            return type(error)
        return None

    assert verdict(said(now), 0) is None
    assert verdict(said(now), now - 10) is None
    assert verdict(said(now), now + 1) is Outdated
    assert verdict(said(now - 2), now + 1) is Outdated
    assert verdict(said(now - 2), now + 1, live=True) is Revoked  # it was here before: there is no doubt
    assert verdict(said(now - 60), now) is Revoked
    assert verdict(said(0), now) is Revoked  # no `iat`, nor in the next token
    assert verdict(said(now - 60, after=0), now) is Revoked
    assert verdict(said(now - 60, after=now), now) is None
    # From the future: it outlives no revocation, and may be right when the clocks agree.
    assert verdict(said(now + 9999), now - 1) is Outdated
    assert verdict(said(now + 9999), now, live=True) is Revoked
    # Our clock was an hour ahead when somebody was revoked, and has stepped back since.
    assert verdict(said(now), now + 3600) is Outdated
    assert verdict(said(now + 3600, after=now + 3600), now + 3600) is None
    # Who was let in by the backend is asked for again, however old the answer is.
    assert verdict(said(now - 60, asked=True), now) is Outdated
    assert verdict(said(now - 60, asked=True), now, live=True) is Outdated
    assert verdict(said(now - 60, asked=True, after=now), now) is None


@pytest.mark.parametrize("moment", [float("nan"), float("inf"), -float("inf"), "1e999", True, "12", None, []])
def test_an_iat_is_a_moment(moment: Any) -> None:
    body = {"sub": "7", "exp": time.time() + 60, "iat": moment}
    with pytest.raises(Unauthorized) as refused:
        Tokens(SECRET).verify(jwt.encode(body, SECRET))
    assert refused.value.way is Final.TOKEN_CLAIM


async def test_after_a_clock_that_stepped_back_new_tokens_count(daemons: Daemons) -> None:
    """The revocation lies ahead of the clock; so must what comes after it, and each further one voids it."""
    daemon = await in_thread(daemons)
    with sqlite3.connect(daemon.directory / "chatd.db") as connection:
        ahead = int(time.time()) + 900
        connection.execute("INSERT INTO chat_users (user_id, valid_after) VALUES (7, ?)", (ahead,))
    connection.close()
    for _ in range(3):
        token = await in_thread(daemon.token_for, 7)
        assert await end_of(daemon, token) == ("ready", 0)
        await ask(daemon, "POST", "users/7/revoke")
        assert await end_of(daemon, token) == ("unauthorized", 4503)


def test_a_revocation_does_not_lie_ahead(daemon: Daemon) -> None:
    answer = daemon.request("POST", "/api/ws/users/8/revoke", {"before": time.time() + 3600})
    assert (answer.status, list(answer.json["errors"])) == (422, ["before"])
    assert daemon.request("POST", "/api/ws/users/8/revoke", {"before": time.time() + 5}).status == 200


async def test_the_backends_word_after_a_revocation_is_the_last(daemons: Daemons) -> None:
    with serving() as backend:
        backend.answer = lambda asked: (200, {"user_id": 7, "expires_in": 60})
        daemon = await in_thread(lambda: daemons(auth__backend_url=f"{backend.url}/auth"))
        async with login(daemon, 7, token="opaque") as client:
            for number in range(2, 7):
                await ask(daemon, "POST", "users/7/revoke")
                if number == 2:
                    assert (await client.closed())[0] == 4001  # it may come back, if the backend says so
                assert await end_of(daemon, "opaque") == ("ready", 0)
                assert len(backend.asked) == number  # a yes of before counts no more
        backend.answer = lambda asked: (401, {})
        await ask(daemon, "POST", "users/7/revoke")
        assert await end_of(daemon, "opaque") == ("unauthorized", 4500)


async def test_a_yes_of_before_counts_on_no_node(
    daemons: Daemons, postgres_url: str, redis_server: Any
) -> None:
    with serving() as backend:
        backend.answer = lambda asked: (200, {"user_id": 7, "expires_in": 60})
        settings = {
            "database__url": postgres_url,
            "redis__url": redis_server.url,
            "auth__backend_url": f"{backend.url}/auth",
        }
        one = await in_thread(lambda: daemons(**settings))
        other = await in_thread(lambda: daemons(**settings))
        for node in (one, other):
            assert await end_of(node, "opaque") == ("ready", 0)
        async with login(other, 7, token="opaque") as client:
            assert len(backend.asked) == 2
            await ask(one, "POST", "users/7/revoke")
            backend.answer = lambda asked: (401, {})
            assert (await client.closed(15.0))[0] == 4001
        for node in (one, other):
            assert await end_of(node, "opaque") == ("unauthorized", 4500)


async def test_a_ban_that_ends_soon_is_not_for_good(daemons: Daemons) -> None:
    daemon = await in_thread(daemons)
    token = await in_thread(daemon.token_for, 7)
    async with login(daemon, 7, token=token) as client:
        until = timestamp(datetime.now(UTC) + timedelta(seconds=2))
        await ask(daemon, "PUT", "users/7/ban", {"until": until})
        assert (await client.closed())[0] == 4005
    assert await end_of(daemon, token) == ("unavailable", 4005)
    with trio.fail_after(10):
        while await end_of(daemon, token) != ("ready", 0):
            await trio.sleep(0.1)


# Tokens that count in a moment.


async def test_clocks_that_differ_a_little_keep_nobody_out(daemons: Daemons) -> None:
    daemon = await in_thread(lambda: daemons(auth__secret=SECRET))
    for claim in ("nbf", "iat"):
        assert await end_of(daemon, sign("HS256", SECRET, **{claim: int(time.time()) + 3})) == ("ready", 0)
    assert await end_of(daemon, sign("HS256", SECRET, exp=int(time.time()) - 2)) == ("ready", 0)
    assert await end_of(daemon, sign("HS256", SECRET, nbf=int(time.time()) + 40)) == ("unavailable", 4005)
    assert await end_of(daemon, sign("HS256", SECRET, nbf=int(time.time()) + 600)) == ("unauthorized", 4500)
    assert "do the clocks differ" in daemon.log


@pytest.mark.parametrize("kid", ["b", None])
async def test_a_key_that_was_published_a_moment_ago_is_waited_for(
    autojump_clock: Any, kid: str | None
) -> None:
    old, new, forged = (ed25519.Ed25519PrivateKey.generate() for _ in range(3))
    keys, up = [jwk(old, "a")], True

    async def read(method: str, url: str, **_: Any) -> Answer:
        if not up:
            raise CallFailed("unreachable", "down")
        return Answer(200, json.dumps({"keys": keys}).encode())

    tokens = Tokens("", Auth(algorithms=["EdDSA"], jwks_url="https://x"), KeyServer(read, "https://x"))  # type: ignore[arg-type]
    headers = {"kid": kid} if kid else None
    token = sign("EdDSA", new, headers)
    assert await tokens.authenticate(sign("EdDSA", old, {"kid": "a"}))
    await trio.sleep(3)
    keys.append(jwk(new, "b"))
    with pytest.raises(NotYet):
        await tokens.authenticate(token)
    up = False
    await trio.sleep(UNKNOWN)
    with pytest.raises(NotYet):  # the key server does not answer, so nobody knows
        await tokens.authenticate(token)
    up = True
    await trio.sleep(UNKNOWN)
    assert (await tokens.authenticate(token)).user_id == 7
    await trio.sleep(UNKNOWN)
    with pytest.raises(Unauthorized) as refused:  # looked for just now, and there is none
        await tokens.authenticate(sign("EdDSA", forged, {"kid": "c"} if kid else None))
    assert refused.value.way is (Final.TOKEN_KEY if kid else Final.TOKEN_SIGNATURE)


# What is issued is accepted.


@pytest.mark.parametrize("frame_bytes", [1024, 65536])
async def test_no_token_is_issued_that_a_login_refuses(daemons: Daemons, frame_bytes: int) -> None:
    daemon = await in_thread(lambda: daemons(limits__frame_bytes=frame_bytes))
    fits, most = 0, 4000
    while most - fits > 1:  # the greatest number of rooms that is issued
        middle = (fits + most) // 2
        body = {"user_id": 7, "conversations": [10**9 + n for n in range(middle)]}
        answer = await in_thread(daemon.request, "POST", "/api/ws/tokens", body)
        if answer.status == 200:
            fits = middle
        else:
            assert (answer.status, list(answer.json["errors"])) == (422, ["conversations"])
            most = middle
    assert fits > 10
    token = await in_thread(lambda: daemon.token_for(7, conversations=[10**9 + n for n in range(fits)]))
    assert await end_of(daemon, token) == ("ready", 0)


# Connections that went dark.


async def test_a_connection_that_went_dark_makes_room(daemons: Daemons) -> None:
    daemon = await in_thread(lambda: daemons(limits__connections_per_user=3))
    async with login(daemon, 7) as one, login(daemon, 7) as other, login(daemon, 7) as dark:
        async with awake(one, other):
            began = trio.current_time()
            async with login(daemon, 7) as phone:
                assert trio.current_time() - began < 6
                async with awake(phone):
                    began = trio.current_time()
                    token = await in_thread(daemon.token_for, 7)
                    assert await end_of(daemon, token) == ("limit_exceeded", 4504)  # all of these answer
                    assert trio.current_time() - began < 3
        assert (await dark.closed())[0] == 4000
        for client in (one, other):
            assert (await client.request("ping"))["event"] == "pong"


async def test_several_that_come_back_at_once_all_get_in(daemons: Daemons) -> None:
    daemon = await in_thread(lambda: daemons(limits__connections_per_user=3))
    token = await in_thread(daemon.token_for, 7)
    async with login(daemon, 7), login(daemon, 7), login(daemon, 7):
        ends: list[tuple[str, int]] = []

        async def come_back() -> None:
            async with login(daemon, 7, token=token) as client, awake(client):
                ends.append(("ready", 0))
                with trio.fail_after(15):
                    while len(ends) < 3:
                        await trio.sleep(0.05)

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(come_back)
        assert ends == [("ready", 0)] * 3


# The rooms of an `auth`.


async def test_thousands_of_rooms_too_many_are_told_of_as_the_client_reads(daemons: Daemons) -> None:
    daemon = await in_thread(daemons)
    async with login(daemon, 7, {str(n): None for n in range(1, 4001)}) as client:
        assert len(client.ready["rooms"]) == 200  # type: ignore[attr-defined]
        told = [await client.expect("unsubscribed") for _ in range(3800)]
        assert {one["code"] for one in told} == {"limit_exceeded"}
        assert [one["conversation_id"] for one in told] == list(range(201, 4001))
        await client.silence()


# What the operator reads.


async def test_the_log_says_what_is_wrong_with_a_token_and_the_client_does_not(daemons: Daemons) -> None:
    daemon = await in_thread(lambda: daemons(auth__secret=SECRET))
    wrong = {
        "not UUIDs": sign("HS256", SECRET, sub="6f9619ff-8b86-d011-b42d-00c04fc964ff"),
        "the token's alg 'HS512' is not in auth.algorithms": jwt.encode(
            {"sub": "7", "exp": 4e9}, "x" * 64, "HS512"
        ),
        "the token has no exp": jwt.encode({"sub": "7"}, SECRET),
        "no key of this server matches": jwt.encode({"sub": "7", "exp": 4e9}, "x" * 32),
        "the token is not a JWT": "a.b",
    }
    for why, token in wrong.items():
        for _ in range(3):
            async with connect(daemon.ws_url) as client:
                assert (await client.request("auth", token=token))["message"] == "this token is not valid"
                assert await client.closed() == (4500, "this token is not valid")
        assert daemon.log.count("login_refused") <= len(wrong)
        if why != "the token is not a JWT":
            assert why in daemon.log, daemon.log


# Every way there is.

Go = Callable[[Daemon, Client], Awaitable[None]]


def by_token(token: Callable[[], str]) -> Go:
    async def go(daemon: Daemon, client: Client) -> None:
        await client.send("auth", ref=1, token=token())

    return go


def by_frame(frame: str | bytes) -> Go:
    async def go(daemon: Daemon, client: Client) -> None:
        await client.ws.send_message(frame)

    return go


def by_deed(method: str, path: str, body: Any = None) -> Go:
    async def go(daemon: Daemon, client: Client) -> None:
        assert (await client.request("auth", token=await in_thread(daemon.token_for, 7)))["event"] == "ready"
        await ask(daemon, method, path, body)

    return go


async def one_too_many(daemon: Daemon, client: Client) -> None:
    token = await in_thread(daemon.token_for, 9)
    async with login(daemon, 9, token=token) as one, login(daemon, 9, token=token) as other, awake(one, other):
        await client.send("auth", token=token)
        await client.expect("error")


async def nothing(daemon: Daemon, client: Client) -> None:
    pass


async def taken_out(daemon: Daemon, client: Client) -> None:
    await ask(daemon, "DELETE", "conversations/5/members/7")


async def url(daemon: Daemon, conversation: object) -> str:
    return f"?token={await in_thread(daemon.token_for, 7)}&conversation_id={conversation}"


WAYS: dict[Final, Go] = {
    Final.TOKEN_MALFORMED: by_token(lambda: jwt.encode({"sub": "7", "exp": "soon"}, SECRET)),
    Final.TOKEN_TOO_LONG: by_token(lambda: "a" * 9000),
    Final.TOKEN_ALGORITHM: by_token(lambda: jwt.encode({"sub": "7", "exp": 4e9}, "x" * 64, "HS512")),
    Final.TOKEN_KEY: by_token(lambda: sign("RS256", headers={"kid": "nobody's"})),
    Final.TOKEN_SIGNATURE: by_token(lambda: sign("HS256", "x" * 32)),
    Final.TOKEN_CLAIM: by_token(lambda: jwt.encode({"sub": "7"}, SECRET)),
    Final.TOKEN_NOT_YET: by_token(lambda: sign("HS256", SECRET, nbf=time.time() + 3600)),
    Final.TOKEN_USER: by_token(lambda: sign("HS256", SECRET, sub="ada")),
    Final.TOKEN_ROOMS: by_token(lambda: sign("HS256", SECRET, conversations=["one"])),
    Final.TOKEN_REFUSED: by_token(lambda: "opaque"),
    Final.TOKEN_IN_URL: nothing,
    Final.BINARY_FRAME: by_frame(b"{}"),
    Final.NO_JSON: by_frame("hello"),
    Final.NO_CONVERSATION: nothing,
    Final.REVOKED: by_deed("POST", "users/7/revoke"),
    Final.BANNED: by_deed("PUT", "users/7/ban"),
    Final.DISCONNECTED: by_deed("POST", "users/7/disconnect"),
    Final.NOT_LET_IN: nothing,
    Final.TAKEN_OUT: taken_out,
    Final.TOO_MANY_CONNECTIONS: one_too_many,
    Final.OTHER_PROTOCOL: nothing,
}


def test_there_is_a_way_for_each() -> None:
    assert set(WAYS) == set(Final)
    assert all(4500 <= way.code <= 4999 for way in Final)
    assert all(code < 4500 for code in Close)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.label)
async def test_each_way_is_gone(daemons: Daemons, way: Final) -> None:
    with serving() as backend:
        backend.answer = lambda asked: (401, {}) if asked.method == "POST" else (200, {"keys": []})
        settings: dict[str, Any] = {"rooms__access": "members", "limits__connections_per_user": 2}
        settings |= {"auth__secret": SECRET, "hub__allow_query_token": way is not Final.TOKEN_IN_URL}
        if way is Final.TOKEN_REFUSED:
            settings["auth__backend_url"] = f"{backend.url}/auth"
        if way is Final.TOKEN_KEY:
            settings |= {"auth__algorithms": "RS256", "auth__jwks_url": f"{backend.url}/jwks.json"}
        daemon = await in_thread(lambda: daemons(**settings))
        if way in (Final.TAKEN_OUT,):
            await ask(daemon, "PUT", "conversations/5/members/7")
        room = {Final.TAKEN_OUT: 5, Final.NOT_LET_IN: 6, Final.TOKEN_IN_URL: 5, Final.NO_CONVERSATION: "x"}.get(
            way
        )
        query = await url(daemon, room) if room else ""
        options = {"subprotocols": ["chatd.v9"]} if way is Final.OTHER_PROTOCOL else {}
        async with connect(daemon.ws_url + query, **options) as client:
            if not room and not options:
                assert (await client.next())["event"] == "hello"
            await WAYS[way](daemon, client)
            assert await client.closed() == (way.code, way.sentence)
        assert way.code != 4500 or way is Final.TOKEN_IN_URL or f'"reason": "{way.label}"' in daemon.log


def test_each_way_is_in_the_documentation_and_nothing_else() -> None:
    text = (ROOT / "docs/errors.md").read_text()
    rows = re.findall(r"^\| (45\d\d) \| `(\w+)` \| (.+) \| (.+) \|$", text, re.M)
    assert [(int(code), label) for code, label, *_ in rows] == [(way.code, way.label) for way in Final]
    assert all(len(why.split()) >= 4 for *_, why in rows)
    codes = {int(code) for code in re.findall(r"^\| (4[5-9]\d\d) \|", text, re.M)}
    assert codes == {way.code for way in Final}


def test_no_code_of_a_final_word_stands_anywhere_else() -> None:
    """The types see to the rest: a goodbye is a `Close`, or one of the ways."""
    for path in (ROOT / "chatd").rglob("*.py"):
        found = re.findall(r"\b4[5-9]\d\d\b", path.read_text())
        allowed = {"errors.py": None, "client.py": ["4500", "4999"]}
        if path.name not in allowed or (allowed[path.name] is not None and path.parent.name == "chatd"):
            assert found == (allowed.get(path.name) or []), path


def test_our_own_tokens_say_after_which_revocation_they_were_issued() -> None:
    tokens = Tokens(SECRET)
    token = tokens.issue(7, 60, since=5)
    assert jwt.decode(token, SECRET, algorithms=["HS256"])[AFTER] == 5
    assert tokens.verify(token).after == 5
    with pytest.raises(BadRequest):
        tokens.issue(7, 60, range(1, 5000))
