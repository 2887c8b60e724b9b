"""Three users go through every event and every route, and print what they say and hear: `python -m tests.tour`.

With `two` they are on two nodes, on one PostgreSQL and one Redis. It ends with what was not seen: an error.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import click
import trio

from chatd.config import Database
from chatd.store.database import migrate
from tests.client import Client, connect
from tests.daemon import Daemon
from tests.services import PostgresServer, RedisServer

ADA, BOB, CYD = 1, 2, 3
NAMES = {ADA: "Ada", BOB: "Bob", CYD: "Cyd"}
ROOM, SIDE = 1, 2

COMMANDS = set(
    "auth refresh subscribe unsubscribe send edit delete react read delivered typing history ping pong".split()  # noqa: SIM905
)
EVENTS = set(
    "hello ready subscribed message message.updated message.deleted receipt typing presence member unsubscribed"  # noqa: SIM905
    " reconnect ok error ping pong".split()
)
ROUTES = {
    "POST /api/ws/messages", "POST /api/ws/messages/batch", "PATCH /api/ws/messages/{id}",
    "DELETE /api/ws/messages/{id}", "GET /api/ws/messages/{id}/delivery",
    "GET /api/ws/conversations/{id}/messages", "GET /api/ws/conversations/{id}",
    "PUT /api/ws/conversations/{id}/members/{id}", "DELETE /api/ws/conversations/{id}/members/{id}",
    "POST /api/ws/conversations/{id}/events", "POST /api/ws/tokens", "GET /api/ws/users/{id}",
    "POST /api/ws/users/{id}/disconnect", "POST /api/ws/users/{id}/revoke", "PUT /api/ws/users/{id}/ban",
    "DELETE /api/ws/users/{id}/ban", "GET /healthz", "GET /readyz", "GET /metrics", "GET /openapi.json",
}  # fmt: skip


class Tour:
    """The nodes, and what was seen of them so far."""

    def __init__(self, here: Daemon, there: Daemon) -> None:
        self.here, self.there = here, there
        self.commands: set[str] = set()
        self.events: set[str] = set()
        self.routes: set[str] = set()

    def say(self, who: str, direction: str, what: Any) -> None:
        text = what if isinstance(what, str) else json.dumps(what, ensure_ascii=False)
        click.echo(f"{who:>8} {direction} {text if len(text) <= 300 else text[:300] + ' …'}")

    async def ask(self, method: str, path: str, body: Any = None, *, status: int = 200) -> Any:
        """As a backend."""
        self.say("backend", "→", f"{method} {path}{' ' + json.dumps(body) if body is not None else ''}")
        answer = await trio.to_thread.run_sync(self.here.request, method, path, body)
        plain = "/".join("{id}" if part.isdecimal() else part for part in path.partition("?")[0].split("/"))
        self.routes.add(f"{method} {plain}")
        self.say("backend", "←", f"{answer.status} {answer.body.decode().strip()}")
        assert answer.status == status
        return answer.json if answer.body.startswith(b"{") else answer.body


class Person:
    """A user on a node: says things, and hears."""

    def __init__(self, tour: Tour, user_id: int, client: Client) -> None:
        self.tour, self.user_id, self.client = tour, user_id, client
        self.name = NAMES[user_id]

    async def send(self, event: str, **fields: Any) -> None:
        self.tour.commands.add(event)
        self.tour.say(self.name, "→", {"event": event} | fields)
        await self.client.send(event, **fields)

    async def request(self, event: str, *, code: str = "", **fields: Any) -> Any:
        self.tour.commands.add(event)
        self.tour.say(self.name, "→", {"event": event} | fields)
        found = await self.client.request(event, **fields)
        self._got(found)
        assert found.get("code", "") == code
        return found

    async def hears(self, event: str, **fields: Any) -> Any:
        found = await self.client.expect(event, **fields)
        self._got(found)
        return found

    def _got(self, event: Any) -> None:
        self.tour.events.add(event["event"])
        shown = event | {"token": "…"} if "token" in event else event
        self.tour.say(self.name, "←", shown)


async def go(here: Daemon, there: Daemon) -> Tour:
    tour = Tour(here, there)
    for path in ("/healthz", "/readyz", "/metrics", "/openapi.json"):
        await tour.ask("GET", path)
    async with AsyncExitStack() as stack:

        async def enter(user_id: int, node: Daemon, **more: Any) -> Person:
            token = (await tour.ask("POST", "/api/ws/tokens", {"user_id": user_id}))["token"]
            person = Person(tour, user_id, await stack.enter_async_context(connect(node.ws_url)))
            await person.hears("hello")
            await person.request("auth", token=token, **more)
            return person

        await _gather(tour)
        ada = await enter(ADA, here, rooms={str(ROOM): None})
        bob = await enter(BOB, there, rooms="*")
        cyd = await enter(CYD, there)
        await _look_around(tour, ada, cyd)
        await _talk(tour, ada, bob, cyd)
        await _read(tour, ada, bob)
        await _moderate(tour, ada, bob, cyd)
        await _resume(tour, ada, bob, enter)
        await _leave(tour, ada, bob, cyd)
    return tour


async def _gather(tour: Tour) -> None:
    for user_id in (ADA, BOB):
        await tour.ask("PUT", f"/api/ws/conversations/{ROOM}/members/{user_id}")
    await tour.ask("PUT", f"/api/ws/conversations/{ROOM}/members/{CYD}", {"role": "moderator"})
    await tour.ask(
        "POST", "/api/ws/messages", {"conversation_id": ROOM, "sender_id": ADA, "content": "Welcome"}
    )
    await tour.ask(
        "POST",
        "/api/ws/messages/batch",
        {
            "messages": [
                {"conversation_id": ROOM, "sender_id": BOB, "content": "imported", "client_id": "old-1"},
                {"conversation_id": ROOM, "sender_id": 0, "content": "wrong"},
            ]
        },
    )


async def _look_around(tour: Tour, ada: Person, cyd: Person) -> None:
    await ada.request("subscribe", conversation_id=ROOM, presence=True)
    await cyd.request("subscribe", conversation_id=ROOM, after=0)
    await ada.request("history", conversation_id=ROOM, limit=1)
    await ada.request("ping")
    await ada.hears("ping")  # of the server, to who is silent
    await ada.send("pong")


async def _talk(tour: Tour, ada: Person, bob: Person, cyd: Person) -> None:
    await ada.send("typing", conversation_id=ROOM, active=True)
    await bob.hears("typing", active=True)
    sent = await ada.request(
        "send", conversation_id=ROOM, content="Lunch?", client_id="a-1", meta={"mentions": [BOB]}
    )
    again = await ada.request(
        "send", conversation_id=ROOM, content="Lunch?", client_id="a-1", meta={"mentions": [BOB]}
    )
    assert (again["id"], again["duplicate"]) == (sent["id"], True)
    await ada.request("send", conversation_id=ROOM, content="Dinner?", client_id="a-1", code="conflict")
    await ada.send("typing", conversation_id=ROOM, active=False)
    await bob.hears("typing", active=False)
    await bob.hears("message", id=sent["id"])
    await bob.request("react", conversation_id=ROOM, id=sent["id"], emoji="👍", on=True)
    await ada.hears("message.updated", reactions={"👍": [BOB]})
    await bob.request("send", conversation_id=ROOM, content="Yes", reply_to=sent["id"])
    await ada.hears("message", reply_to=sent["id"])
    await ada.request("edit", conversation_id=ROOM, id=sent["id"], content="Lunch at one?")
    await cyd.hears("message.updated", content="Lunch at one?")
    await tour.ask("PATCH", f"/api/ws/messages/{sent['id']}", {"meta": None})
    await bob.request("delete", conversation_id=ROOM, id=sent["id"], code="forbidden")
    await cyd.request("delete", conversation_id=ROOM, id=sent["id"])  # a moderator
    await ada.hears("message.deleted", id=sent["id"])
    await tour.ask(
        "POST", f"/api/ws/conversations/{ROOM}/events", {"event": "call.started", "data": {"by": ADA}}
    )
    assert (await bob.hears("call.started"))["data"] == {"by": ADA}
    tour.events.discard("call.started")


async def _read(tour: Tour, ada: Person, bob: Person) -> None:
    newest = await tour.ask("GET", f"/api/ws/conversations/{ROOM}/messages?limit=1")
    id = newest["messages"][0]["id"]
    await ada.request("delivered", conversation_id=ROOM, id=id)
    await bob.hears("receipt", user_id=ADA, delivered=id)
    await ada.request("read", conversation_id=ROOM, id=id)
    await bob.hears("receipt", user_id=ADA, read=id)
    await tour.ask("GET", f"/api/ws/messages/{id}/delivery")
    await tour.ask("GET", f"/api/ws/conversations/{ROOM}")
    await tour.ask("GET", f"/api/ws/users/{BOB}")


async def _moderate(tour: Tour, ada: Person, bob: Person, cyd: Person) -> None:
    await tour.ask(
        "PUT", f"/api/ws/conversations/{ROOM}/members/{BOB}", {"muted_until": "2999-01-01T00:00:00Z"}
    )
    await bob.request("send", conversation_id=ROOM, content="Hello?", code="muted")
    await tour.ask("DELETE", f"/api/ws/conversations/{ROOM}/members/{BOB}")
    await ada.hears("member", change="removed")
    await bob.hears("unsubscribed", conversation_id=ROOM)
    await bob.request("history", conversation_id=ROOM, code="not_found")
    await tour.ask("PUT", f"/api/ws/conversations/{ROOM}/members/{BOB}", {"muted_until": None})
    await ada.hears("member", change="added")
    await bob.request("subscribe", conversation_id=ROOM)
    posted = await tour.ask(
        "POST", "/api/ws/messages", {"conversation_id": ROOM, "sender_id": BOB, "content": "by mistake"}
    )
    await tour.ask("DELETE", f"/api/ws/messages/{posted['id']}")


async def _resume(tour: Tour, ada: Person, bob: Person, enter: Any) -> None:
    """Bob's connection is cut; he comes back with his cursor and has what he missed."""
    state = await bob.request("subscribe", conversation_id=ROOM)
    await tour.ask("POST", f"/api/ws/users/{BOB}/disconnect", {"reconnect": True})
    tour.say("Bob", "←", f"close {(await bob.client.closed())[0]}")
    await ada.hears("presence", user_id=BOB, online=False)
    await ada.request("send", conversation_id=ROOM, content="while you were away")
    back = await enter(BOB, tour.there, rooms={str(ROOM): state["seq"]}, epoch=state["epoch"])
    await ada.hears("presence", user_id=BOB, online=True)
    fresh = (await tour.ask("POST", "/api/ws/tokens", {"user_id": BOB, "ttl": 60}))["token"]
    await back.request("refresh", token=fresh)
    await back.request("unsubscribe", conversation_id=ROOM)


async def _leave(tour: Tour, ada: Person, bob: Person, cyd: Person) -> None:
    await tour.ask("POST", f"/api/ws/users/{CYD}/revoke")
    tour.say("Cyd", "←", f"close {(await cyd.client.closed())[0]}")
    await tour.ask("PUT", f"/api/ws/users/{BOB}/ban", {"until": "2999-01-01T00:00:00Z"})
    await tour.ask("DELETE", f"/api/ws/users/{BOB}/ban")
    stopping = trio.to_thread.run_sync
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stopping, tour.here.stop)
        await ada.hears("reconnect")
        tour.say("Ada", "←", f"close {(await ada.client.closed())[0]}")


@contextmanager
def nodes(cluster: str, directory: Path) -> Iterator[tuple[Daemon, Daemon]]:
    settings: dict[str, Any] = {
        "rooms__access": "members",
        "hub__ping_interval": 1.0,
        "server__drain_window": 0.5,
    }
    with ExitStack() as stack:
        made = []
        if cluster == "two":
            for name in ("postgres", "redis"):
                (directory / name).mkdir()
            postgres = stack.enter_context(PostgresServer(directory / "postgres"))
            redis = stack.enter_context(RedisServer(directory / "redis"))
            url = postgres.create_database()
            migrate(Database(url=url))
            settings |= {"database__url": url, "redis__url": redis.url}
        for number in range(2 if cluster == "two" else 1):
            (directory / f"node{number}").mkdir()
            made.append(Daemon(directory / f"node{number}", **settings))
            stack.callback(made[-1].close)
            made[-1].start()
        yield made[0], made[-1]


def missed(tour: Tour) -> list[str]:
    return sorted((COMMANDS - tour.commands) | (EVENTS - tour.events) | (ROUTES - tour.routes))


@click.command()
@click.argument("cluster", type=click.Choice(["one", "two"]), default="one")
def main(cluster: str) -> None:
    """Walk through chatd.v1: on SQLite by itself (one), or on two nodes (two)."""
    with tempfile.TemporaryDirectory(prefix="chatd-tour-") as directory:
        Path(directory).chmod(0o755)  # PostgreSQL is another user
        with nodes(cluster, Path(directory)) as (here, there):
            tour = trio.run(go, here, there)
    left = missed(tour)
    seen = f"{len(tour.commands)} requests, {len(tour.events)} events, {len(tour.routes)} routes"
    click.echo(f"\nSeen: {seen}. Not seen: {', '.join(left) or 'nothing'}.")
    sys.exit(bool(left))


if __name__ == "__main__":
    main()
