"""A WebSocket client for tests: says what it wants, and fails when it does not come in time."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlsplit

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

PATIENCE = 10.0  # seconds

Event = dict[str, Any]


class Client:
    """`received` has every event that nobody has taken yet, in the order they came."""

    def __init__(self, ws: WebSocketConnection) -> None:
        self.ws = ws
        self.received: deque[Event] = deque()
        self._ref = 0

    async def send(self, event: str, **fields: Any) -> None:
        await self.ws.send_message(json.dumps({"event": event} | fields))

    async def next(self, patience: float = PATIENCE) -> Event:
        """The next event, whatever it is."""
        if self.received:
            return self.received.popleft()
        with trio.fail_after(patience):
            return dict(json.loads(await self.ws.get_message()))

    async def expect(self, event: str, patience: float = PATIENCE, **fields: Any) -> Event:
        """The first event of this name with these fields; what comes before stays in `received`."""
        skipped: list[Event] = []
        with trio.fail_after(patience):
            while True:
                found = await self.next(patience)
                if found["event"] == event and all(found.get(key) == value for key, value in fields.items()):
                    self.received.extendleft(reversed(skipped))
                    return found
                skipped.append(found)

    async def request(self, event: str, **fields: Any) -> Event:
        """Send with a `ref` and return the one reply that bears it."""
        self._ref += 1
        ref = self._ref
        await self.send(event, ref=ref, **fields)
        skipped: list[Event] = []
        with trio.fail_after(PATIENCE):
            while True:
                found = await self.next()
                if found.get("ref") == ref:
                    self.received.extendleft(reversed(skipped))
                    return found
                skipped.append(found)

    async def messages(self, count: int, patience: float = PATIENCE) -> list[Event]:
        """The next so many changes; nothing else may come between them but pings and members."""
        found: list[Event] = []
        with trio.fail_after(patience):
            while len(found) < count:
                event = await self.next(patience)
                if event["event"] in ("message", "message.updated", "message.deleted"):
                    found.append(event)
                else:
                    assert event["event"] in ("ping", "member", "ok"), event
        return found

    async def silence(self, seconds: float = 0.3) -> None:
        """Nothing is on its way, which a round trip shows, and nothing comes for a while."""
        assert not self.received, self.received
        await self.request("ping")
        assert not self.received, self.received
        with trio.move_on_after(seconds):
            raise AssertionError(f"unexpected: {await self.ws.get_message()}")

    async def closed(self, patience: float = PATIENCE) -> tuple[int, str | None]:
        """Wait for the end: (close code, reason)."""
        with trio.fail_after(patience):
            while True:
                try:
                    self.received.append(json.loads(await self.ws.get_message()))
                except ConnectionClosed as end:
                    assert end.reason is not None
                    return end.reason.code, end.reason.reason


@asynccontextmanager
async def awake(*clients: Client) -> AsyncIterator[None]:
    """A block in which these answer pings, as an application's client does. Nothing else reads from them."""

    async def answer(client: Client) -> None:
        while True:
            found = dict(json.loads(await client.ws.get_message()))
            if found["event"] == "ping":
                await client.send("pong")
            else:
                client.received.append(found)

    async with trio.open_nursery() as nursery:
        for client in clients:
            nursery.start_soon(answer, client)
        yield
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def connect(url: str, **options: Any) -> AsyncIterator[Client]:
    """A bare connection: nothing is read yet, not even `hello`. Options are those of `wrap_client_stream`."""
    parts = urlsplit(url)
    assert parts.hostname and parts.port
    resource = f"{parts.path}?{parts.query}" if parts.query else parts.path
    # The stream is ours, for the library leaves it open when the server has said goodbye first.
    async with await trio.open_tcp_stream(parts.hostname, parts.port) as stream, trio.open_nursery() as nursery:
        with trio.fail_after(PATIENCE):
            ws = await wrap_client_stream(
                nursery, stream, f"{parts.hostname}:{parts.port}", resource, **options
            )
        yield Client(ws)
        with trio.move_on_after(1):
            await ws.aclose()
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def login(
    daemon: Any, user_id: int, rooms: Any = None, *, token: str | None = None, **fields: Any
) -> AsyncIterator[Client]:
    """An authenticated connection; its `ready` is in `client.ready`."""
    token = token or await trio.to_thread.run_sync(daemon.token_for, user_id)
    async with connect(daemon.ws_url) as client:
        assert (await client.next())["event"] == "hello"
        client.ready = await client.request("auth", token=token, rooms=rooms, **fields)  # type: ignore[attr-defined]
        assert client.ready["event"] == "ready", client.ready  # type: ignore[attr-defined]
        yield client
