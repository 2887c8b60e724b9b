"""The security list, a test for each of its lines that concerns this daemon and has none elsewhere.

docs/security.md names them all. S4, S5, S6, S25 and S26 are in test_auth.
"""

from __future__ import annotations

import json
import socket
import subprocess
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from trio_websocket import HandshakeError

from chatd.config import DEMO_TOKEN
from tests.client import awake, connect, login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.services import free_port
from tests.test_limits import status_of_upgrade

SECRET = "s" * 32
MESSAGES = "/api/ws/messages"


async def refused(daemon: Daemon, headers: list[tuple[bytes, bytes]]) -> int:
    """The HTTP status of a handshake that is refused."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011  # a group, of the client's nursery
        async with connect(daemon.ws_url, extra_headers=headers):
            pass
    error: Any = caught.value
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, HandshakeError)
    return int(error.status_code)  # type: ignore[attr-defined]


def test_s1_a_port_without_tls_is_loudly_said(daemons: Daemons, daemon: Daemon) -> None:
    assert "no_tls" in daemons(hub__bind=f"0.0.0.0:{free_port()}").log
    assert "no_tls" not in daemon.log


async def test_s2_a_foreign_page_gets_no_socket(daemons: Daemons) -> None:
    daemon = daemons(hub__origins="https://app.example.com")
    for origin in (
        b"https://app.example.com.evil.com",
        b"http://app.example.com",
        b"https://app.example.com:8443",
        b"null",
        b"https://APP.example.com",
    ):
        assert await refused(daemon, [(b"Origin", origin)]) == 403
    async with connect(daemon.ws_url, extra_headers=[(b"Origin", b"https://app.example.com")]) as client:
        assert (await client.next())["event"] == "hello"
    # A cookie is nothing to us: without a token nobody is in.
    async with connect(daemon.ws_url, extra_headers=[(b"Cookie", b"session=1")]) as client:
        await client.next()
        assert (await client.request("subscribe", conversation_id=1))["code"] == "unauthorized"


async def test_s3_a_token_reaches_no_log_and_no_url(daemons: Daemons) -> None:
    daemon = daemons(logs__level="debug", hub__auth_timeout=0.3)
    token = daemon.token_for(7)
    async with login(daemon, 7, token=token) as client:
        await client.request("refresh", token=token)
        await client.request("refresh", token="not.a.token")
        await client.closed()
    async with connect(f"{daemon.ws_url}?token={token}&conversation_id=1") as client:
        assert (await client.closed())[0] == 4500
    async with connect(daemon.ws_url) as client:
        assert (await client.closed())[0] == 4004
    assert token not in daemon.log
    assert token.rpartition(".")[2] not in daemon.log


def test_s7_the_internal_token_is_compared_as_bytes(daemon: Daemon) -> None:
    for given in ("", "x", daemon.token[:-1], daemon.token + "x", daemon.token.upper(), "t\xf6ken"):
        for method, path in (("POST", MESSAGES), ("GET", "/api/ws/users/1"), ("DELETE", "/nowhere")):
            answer = daemon.request(method, path, headers={"X-Internal-Token": given})
            assert (answer.status, answer.json["message"]) == (401, "Unauthorized")


@pytest.mark.parametrize("path", [MESSAGES, "/api/ws/tokens"])  # two ways in: past Quart, and through it
def test_s7_a_doubled_internal_token_is_none(daemon: Daemon, path: str) -> None:
    """A proxy that has judged one of them does not know which one counts here."""
    body = b'{"conversation_id":1,"sender_id":1,"user_id":1,"content":"x"}'

    def answer(*tokens: str) -> int:
        lines = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", "Connection: close"]
        lines += [f"Content-Length: {len(body)}", *(f"X-Internal-Token: {token}" for token in tokens)]
        with socket.create_connection(("127.0.0.1", daemon.api_port), timeout=10) as peer:
            peer.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
            return int(peer.makefile("rb").readline().split()[1])

    assert answer(daemon.token) == 200
    for tokens in ((daemon.token, daemon.token), ("x", daemon.token), (daemon.token, "x"), ()):
        assert answer(*tokens) == 401, tokens


async def test_s8_who_guesses_is_slowed_and_nobody_else(daemons: Daemons) -> None:
    daemon = daemons(limits__trusted_proxies="127.0.0.1", auth__secret=SECRET)

    async def try_to(token: str, address: str) -> tuple[str, int]:
        headers = [(b"X-Forwarded-For", address.encode())]
        async with connect(daemon.ws_url, extra_headers=headers) as client:
            await client.next()
            answer = await client.request("auth", token=token)
            if answer["event"] == "ready":
                return "ready", 0
            assert answer["code"] != "rate_limited" or 0 < answer["retry_after"] <= 6
            return answer["code"], (await client.closed())[0]

    good, old = daemon.token_for(7), jwt.encode({"sub": "7", "exp": 1}, SECRET)
    for _ in range(15):  # expired is not guessed
        assert await try_to(old, "192.0.2.1") == ("token_expired", 4001)
    for _ in range(10):
        assert await try_to("guess", "192.0.2.1") == ("unauthorized", 4500)
    assert await try_to("guess", "192.0.2.1") == ("rate_limited", 4006)
    assert await try_to(good, "192.0.2.1") == ("ready", 0)  # who shares the address, behind a NAT
    assert await try_to("guess", "192.0.2.2") == ("unauthorized", 4500)


async def test_s8_the_failures_of_others_end_no_live_connection(daemons: Daemons) -> None:
    daemon = daemons(limits__trusted_proxies="127.0.0.1", limits__failed_logins_per_minute=1)
    headers = [(b"X-Forwarded-For", b"192.0.2.1")]
    token = daemon.token_for(7)
    async with connect(daemon.ws_url, extra_headers=headers) as live:
        await live.next()
        assert (await live.request("auth", token=token))["event"] == "ready"
        for code in (4500, 4006, 4006):
            async with connect(daemon.ws_url, extra_headers=headers) as guesser:
                await guesser.next()
                await guesser.request("auth", token="guess")
                assert (await guesser.closed())[0] == code
        assert (await live.request("refresh", token=token))["event"] == "ok"


async def test_s8_a_household_is_one_guesser_however_many_addresses_it_has(daemons: Daemons) -> None:
    daemon = daemons(limits__trusted_proxies="127.0.0.1", limits__failed_logins_per_minute=3)
    codes = []
    for address in (*(f"2001:db8:0:1::{n}" for n in range(5)), "2001:db8:0:2::1"):
        headers = [(b"X-Forwarded-For", address.encode())]
        async with connect(daemon.ws_url, extra_headers=headers) as guesser:
            await guesser.next()
            await guesser.request("auth", token="guess")
            codes.append((await guesser.closed())[0])
    assert codes == [4500] * 3 + [4006] * 2 + [4500]


async def test_s9_each_proxy_may_add_a_line(daemons: Daemons) -> None:
    """HAProxy's `option forwardfor` does, behind a load balancer: its clients are not all one."""
    daemon = daemons(limits__trusted_proxies="127.0.0.1,10.0.0.0/8", limits__connections_per_address=1)
    async with AsyncExitStack() as held:
        for client in range(3):
            lines = [f"203.0.113.{client}:5000", "10.0.0.5"]
            headers = [(b"X-Forwarded-For", line.encode()) for line in lines]
            guest = await held.enter_async_context(connect(daemon.ws_url, extra_headers=headers))
            assert (await guest.next())["event"] == "hello"


async def test_s9_s10_s16_limits_are_said_with_their_codes(daemons: Daemons) -> None:
    daemon = daemons(limits__connections_per_user=1, limits__frame_bytes=2048, limits__sends_per_second=1)
    async with login(daemon, 7, {"1": None}) as client:
        async with awake(client), connect(daemon.ws_url) as second:
            await second.next()
            answer = await second.request("auth", token=daemon.token_for(7))
            assert answer["code"] == "limit_exceeded"
            assert (await second.closed())[0] == 4504
        codes = [(await client.request("send", conversation_id=1, content="x")).get("code") for _ in range(5)]
        assert codes[:2] == [None, None]
        assert "rate_limited" in codes
        await client.ws.send_message("x" * 2049)
        assert (await client.closed())[0] == 1009


async def test_s12_nothing_is_compressed(daemon: Daemon) -> None:
    offer = [(b"Sec-WebSocket-Extensions", b"permessage-deflate; client_max_window_bits")]
    async with connect(daemon.ws_url, extra_headers=offer) as client:
        headers = {name.lower() for name, _ in client.ws.handshake_headers}
        assert b"sec-websocket-extensions" not in headers
        assert (await client.next())["event"] == "hello"


async def test_s18_json_that_is_strange_is_a_bad_request(daemon: Daemon, conversation: int) -> None:
    deep = "[" * 40 + "]" * 40
    bodies = [
        f'"meta": {deep}, "content": "x"', '"content": 1e999', '"content": NaN', '"content": "\\ud800"',
        '"content": "a\\u0000b"', '"content": "x", "reply_to": 9007199254740993',
    ]  # fmt: skip
    for body in bodies:
        whole = f'{{"conversation_id": {conversation}, "sender_id": 1, {body}}}'.encode()
        answer = await trio.to_thread.run_sync(daemon.request, "POST", MESSAGES, whole)
        assert answer.status in (400, 422), body
        async with login(daemon, 7, {str(conversation): None}) as client:
            await client.ws.send_message(f'{{"event":"send","ref":9,"conversation_id":{conversation},{body}}}')
            assert (await client.expect("error"))["code"] == "bad_request", body
    assert daemon.get(f"/api/ws/conversations/{conversation}/messages").json["messages"] == []


async def test_s19_one_event_is_one_line_of_the_log(daemons: Daemons) -> None:
    daemon = daemons(logs__level="debug")
    evil = 'x\r\n{"event":"forged"}\x1b[31m\u202e'
    async with login(daemon, 7, {"1": None}) as client:
        await client.request("send", conversation_id=1, content=evil, client_id=evil)
        await client.request("\n" + evil)
    daemon.request("POST", MESSAGES, {"conversation_id": evil})
    lines = daemon.log.splitlines()
    assert all(json.loads(line)["event"] != "forged" for line in lines)
    assert "\x1b" not in daemon.log
    assert "\u202e" not in daemon.log


def test_s20_secrets_are_shown_nowhere(daemons: Daemons) -> None:
    internal, shared = "internal-" + "i" * 32, "shared-" + "s" * 32
    daemon = daemons(api__internal_token=internal, auth__secret=shared)
    daemon.request("POST", MESSAGES, {"x": 1})
    checked = daemon.command("check-config")
    shown = daemon.log + daemon.get("/metrics").body.decode() + checked.stdout + checked.stderr
    arguments = Path(f"/proc/{daemon.pid}/cmdline").read_text()
    broken = subprocess.run(
        [*daemon.program(), "check-config"],
        env=daemon.environ | {"CHATD_AUTH__SECRET": "too-short", "CHATD_HUB__BIND": "x"},
        cwd=daemon.directory, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert broken.returncode == 78
    for secret in (internal, shared, "too-short"):
        assert secret not in shown + arguments + broken.stdout + broken.stderr


async def test_s21_a_foreign_room_looks_like_none(daemons: Daemons) -> None:
    daemon = daemons(rooms__access="members")
    daemon.request("PUT", "/api/ws/conversations/1/members/1")
    id = daemon.post(1, 1, "secret")["id"]
    async with login(daemon, 2) as client:
        for event, fields in (
            ("subscribe", {}),
            ("history", {}),
            ("send", {"content": "x"}),
            ("edit", {"id": id, "content": "x"}),
            ("delete", {"id": id}),
            ("react", {"id": id, "emoji": "x", "on": True}),
            ("read", {"id": id}),
            ("delivered", {"id": id}),
            ("typing", {"active": True}),
        ):
            there, nowhere = [await client.request(event, conversation_id=room, **fields) for room in (1, 999)]
            assert (there["code"], there["message"]) == (nowhere["code"], nowhere["message"]), event
            assert there["code"] == "not_found"


def test_s27_the_api_is_not_for_browsers(daemon: Daemon, demo: Daemon) -> None:
    for path, body in (
        (MESSAGES, {"conversation_id": 1, "sender_id": 1, "content": "x"}),
        ("/api/ws/tokens", {}),
    ):
        answer = daemon.request("POST", path, body, {"Origin": "https://evil.example.com"})
        assert (answer.status, answer.json["code"]) == (403, "forbidden")
        assert not [name for name in answer.headers if name.lower().startswith("access-control")]
    answer = demo.request("GET", "/demo/token?user=1", headers={"Origin": "https://evil.example.com"})
    assert not [name for name in answer.headers if name.lower().startswith("access-control")]


def test_s28_everything_but_the_open_paths_wants_the_token(daemon: Daemon) -> None:
    paths = daemon.get("/openapi.json").json["paths"]
    for path, methods in paths.items():
        for method in methods:
            real = path.replace("{", "").replace("}", "").replace("_id", "")
            real = "/".join(
                "1" if part in ("conversation", "user", "message") else part for part in real.split("/")
            )
            answer = daemon.request(method.upper(), real, headers={"X-Internal-Token": ""})
            assert answer.status == (200 if path in ("/healthz", "/readyz") else 401), (method, real)
    for method in ("TRACE", "PUT"):
        assert daemon.request(method, MESSAGES).status == 405


def test_s29_the_page_runs_no_script_but_its_own(demo: Daemon, daemon: Daemon) -> None:
    headers = demo.request("GET", "/", headers={"X-Internal-Token": ""}).headers
    policy = headers["Content-Security-Policy"]
    for part in (
        "default-src 'none'", "script-src 'self'", "base-uri 'none'", "frame-ancestors 'none'",
        "form-action 'none'", "require-trusted-types-for 'script'",
    ):  # fmt: skip
        assert part in policy
    assert (headers["X-Content-Type-Options"], headers["Referrer-Policy"]) == ("nosniff", "no-referrer")
    assert demo.token == DEMO_TOKEN
    assert daemon.get("/").status == 404  # without --demo there is no page


STRANGERS = ("evil.example", "evil.example:8080", "localhost.evil.example", "192.0.2.1", "[::")


def test_s29_the_demo_answers_to_no_name_of_another_site(demo: Daemon, daemon: Daemon) -> None:
    """A page whose name was made to lead to this machine is of one origin with it, for a browser."""
    for host in STRANGERS:
        for method, path, body in (
            ("GET", "/demo/token?user=1", None),
            ("GET", "/", None),
            ("GET", "/status", None),
            ("GET", "/api/ws/users/1", None),
            ("POST", MESSAGES, {"conversation_id": 1, "sender_id": 1, "content": "x"}),
        ):
            answer = demo.request(method, path, body, headers={"Host": host})
            assert answer.status == 403, (host, path)
            assert b"token" not in answer.body
    for host in ("localhost", "LOCALHOST:80", f"127.0.0.1:{demo.api_port}", "127.1.2.3", "[::1]:8080"):
        assert demo.request("GET", "/demo/token?user=1", headers={"Host": host}).status == 200, host
    assert daemon.request("GET", "/api/ws/users/1", headers={"Host": "chat.internal"}).status == 200


async def test_s29_nor_does_its_hub(demo: Daemon) -> None:
    for host, status in (("evil.example", 403), ("localhost", 101), ("127.0.0.1:6001", 101)):
        assert await status_of_upgrade(demo, host, f"http://{host}") == status, host


async def test_s33_what_is_ephemeral_is_bounded(daemon: Daemon, conversation: int) -> None:
    """Typing and receipts in a flood: the room hears a few, and the sender is told to slow down."""
    room = {str(conversation): None}
    id = daemon.post(conversation, 1, "hello")["id"]
    async with login(daemon, 7, room) as loud, login(daemon, 8, room) as quiet:
        began = time.monotonic()
        for _ in range(60):
            await loud.send("typing", conversation_id=conversation, active=True)
            await loud.send("read", conversation_id=conversation, id=id)
            await loud.send("typing", conversation_id=conversation, active=False)
        await loud.request("ping")
        await quiet.expect("receipt")
        await quiet.request("ping")
        heard = [one["event"] for one in quiet.received]
        assert heard.count("typing") <= 2 + (time.monotonic() - began)
        assert heard.count("receipt") == 0
