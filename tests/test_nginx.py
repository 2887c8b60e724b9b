"""docs/nginx-websocket.conf, as it is shipped, in a real nginx before a real chatd."""

from __future__ import annotations

import http.client
import ssl
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from chatd.config import Hub
from chatd.ops.client import Connection, Disconnected, connect
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.nginx import NAME, SHIPPED, Nginx

HANDSHAKE = {
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
}


@pytest.fixture(scope="module")
def nginx(daemon: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with Nginx(tmp_path_factory.mktemp("nginx"), daemon.hub_port) as server:
        yield server


def trust(nginx: Nginx) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=nginx.certificate)


def ask(
    nginx: Nginx,
    method: str,
    path: str,
    headers: dict[str, str] | None = None,
    body: bytes | None = None,
    *,
    source: str = "127.0.0.1",
) -> tuple[int, dict[str, str], bytes, http.client.HTTPSConnection]:
    """The connection is left open: after a 101 it is a WebSocket."""
    connection = http.client.HTTPSConnection(
        NAME, nginx.port, timeout=5, context=trust(nginx), source_address=(source, 0)
    )
    connection.request(method, path, body, headers or {})
    response = connection.getresponse()
    body = b"" if response.status == 101 else response.read()
    return response.status, dict(response.getheaders()), body, connection


def status_of(*arguments: Any, **options: Any) -> int:
    status, _, _, connection = ask(*arguments, **options)
    connection.close()
    return status


@asynccontextmanager
async def login(daemon: Daemon, nginx: Nginx, room: int) -> AsyncIterator[Connection]:
    token = await trio.to_thread.run_sync(daemon.token_for, 5)
    async with connect(nginx.url, origin=nginx.https, context=trust(nginx)) as connection:
        assert (await connection.next())["event"] == "hello"
        ready = await connection.request("auth", token=token, rooms={str(room): None})
        assert ready["event"] == "ready", ready
        yield connection


async def hear(connection: Connection, event: str, **fields: Any) -> dict[str, Any]:
    with trio.fail_after(10):
        while True:
            heard = await connection.next()
            if heard["event"] == event and all(heard.get(key) == value for key, value in fields.items()):
                return heard


async def test_events_pass_both_ways(daemon: Daemon, nginx: Nginx, conversation: int) -> None:
    async with login(daemon, nginx, conversation) as one, login(daemon, nginx, conversation) as other:
        sent = await one.request("send", conversation_id=conversation, content="Hello")
        assert sent["event"] == "ok"
        assert (await hear(other, "message"))["content"] == "Hello"
        await trio.to_thread.run_sync(daemon.post, conversation, 6, "x" * 8000)
        assert len((await hear(one, "message", user_id=6))["content"]) == 8000


def test_the_internal_api_is_closed_to_the_right_token_too(daemon: Daemon, nginx: Nginx) -> None:
    headers = {"X-Internal-Token": daemon.token, "Content-Type": "application/json"}
    routes = [
        (method.upper(), path.replace("{", "").replace("}", ""))
        for path, methods in daemon.get("/openapi.json").json["paths"].items()
        for method in methods
    ]
    assert len(routes) > 15
    routes += [("GET", path) for path in ("/metrics", "/openapi.json", "/", "/ws/", "/ws/../metrics")]
    routes += [("GET", "//metrics"), ("GET", "/ws/%2e%2e/api/ws/users/1"), ("POST", "/ws/api/ws/messages")]
    for method, path in routes:
        status, given, body, connection = ask(nginx, method, path, headers, b"{}" if method != "GET" else None)
        connection.close()
        assert (status, b"nginx" in body) == (404, True), (method, path, status, body)
        assert given["Server"] == "nginx"
    # Through the one location that is passed on, only what speaks WebSocket is answered.
    assert status_of(nginx, "GET", "/ws", headers) == 400
    assert status_of(nginx, "GET", "/ws?/api/ws/users/1", headers) == 400


def test_bodies_and_headers_are_limited(nginx: Nginx) -> None:
    assert status_of(nginx, "POST", "/ws", {}, b"x" * 17 * 1024) == 413
    assert status_of(nginx, "GET", "/ws", HANDSHAKE | {"Authorization": "Bearer " + "x" * 17 * 1024}) == 400


async def test_the_log_has_no_token(daemon: Daemon, nginx: Nginx) -> None:
    status = await trio.to_thread.run_sync(status_of, nginx, "GET", "/ws?token=verysecret", HANDSHAKE)
    assert status == 101
    with trio.fail_after(10):
        while '"GET /ws" 101' not in nginx.log():
            await trio.sleep(0.02)
    assert "verysecret" not in nginx.log()


async def test_a_reload_keeps_connections(daemon: Daemon, nginx: Nginx, conversation: int) -> None:
    async with login(daemon, nginx, conversation) as old:
        await trio.to_thread.run_sync(nginx.reload)
        async with login(daemon, nginx, conversation) as new:
            await trio.to_thread.run_sync(daemon.post, conversation, 6, "after the reload")
            for connection in (old, new):
                assert (await hear(connection, "message"))["content"] == "after the reload"


def test_the_client_s_address_is_the_real_one_whatever_it_claims(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons(limits__connections_per_address=1, limits__trusted_proxies="127.0.0.1")
    with Nginx(tmp_path, daemon.hub_port) as nginx:
        open_ones = []
        for source, claimed, expected in (
            ("127.0.0.2", "10.0.0.1", 101),
            ("127.0.0.2", "10.0.0.2", 503),  # another claim, the same address
            ("127.0.0.3", "10.0.0.1", 101),  # the same claim, another address
        ):
            headers = HANDSHAKE | {"X-Forwarded-For": claimed}
            status, _, _, connection = ask(nginx, "GET", "/ws", headers, source=source)
            assert status == expected, (source, claimed)
            open_ones.append(connection)
        for connection in open_ones:
            connection.close()


async def test_a_drain_reaches_the_clients(daemons: Daemons, tmp_path: Path) -> None:
    daemon = daemons()
    with Nginx(tmp_path, daemon.hub_port) as nginx:
        async with login(daemon, nginx, 1) as connection, trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, daemon.stop)
            assert (await hear(connection, "reconnect"))["reason"]
            with pytest.raises(Disconnected) as end:
                await hear(connection, "nothing")
            assert end.value.code == 1012


async def test_one_address_cannot_take_all_places(daemon: Daemon, tmp_path: Path) -> None:
    """The shipped numbers are for companies; smaller ones show that they count."""
    shipped, small = "limit_conn chatd_connections 500;", "limit_conn chatd_connections 2;"
    with Nginx(tmp_path, daemon.hub_port, without=shipped, instead=small) as nginx:
        asked = [ask(nginx, "GET", "/ws", HANDSHAKE) for _ in range(3)]
        assert [status for status, *_ in asked] == [101, 101, 503]
        assert status_of(nginx, "GET", "/ws", HANDSHAKE, source="127.0.0.9") == 101
        for *_, connection in asked:
            connection.close()


def test_the_timeouts_are_above_the_pings() -> None:
    seconds = Hub().ping_interval + Hub().ping_timeout
    for name in ("proxy_read_timeout", "proxy_send_timeout"):
        (value,) = [
            line.split()[1] for line in SHIPPED.read_text().splitlines() if line.strip().startswith(name)
        ]
        assert float(value.rstrip("s;")) > 2 * seconds
