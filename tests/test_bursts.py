"""A reader that reads is not cut, whatever its rooms bring at once; one that does not read is.

Real sockets. What does not fit into a connection's outbox is read for it from the database, as it takes it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio

from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.test_links import Peer, closed_with, fill, peer

ROOMS = 10
SIZE = 8000  # of a message
RATE = 1_000_000  # bytes a second that the reader takes
READ = 16 * 1024  # bytes at once
PATIENCE = 90.0
PING, PONG, SLACK = 1.0, 1.0, 3.0  # seconds


@pytest.fixture
async def daemon(daemons: Daemons) -> Daemon:
    return await trio.to_thread.run_sync(lambda: daemons(hub__ping_interval=PING, hub__ping_timeout=PONG))


class Reader:
    """What a client makes of its events: each room's changes, and a complaint where it misses one."""

    def __init__(self, one: Peer) -> None:
        self.peer = one
        self.seqs: defaultdict[int, list[int]] = defaultdict(list)
        self.resets = 0

    async def read_until(self, last: dict[int, int]) -> None:
        """Until each of these rooms has come to this seq; at `RATE`."""
        with trio.fail_after(PATIENCE):
            while any(not (have := self.seqs[room]) or have[-1] < seq for room, seq in last.items()):
                for event in await self.peer.some(READ):
                    await self._take(event)
                await trio.sleep(READ / RATE)

    async def _take(self, event: dict[str, Any]) -> None:
        match event.get("event"):
            case "message":
                self.seqs[event["conversation_id"]].append(event["seq"])
            case "subscribed":
                self.resets += not event["recovered"]
                self.seqs[event["conversation_id"]] += [change["seq"] for change in event["changes"]]
            case "ping":
                await self.peer.send("pong")


@asynccontextmanager
async def in_rooms(daemon: Daemon, rooms: list[int], **options: Any) -> AsyncIterator[Peer]:
    token = await trio.to_thread.run_sync(daemon.token_for, 1)
    async with peer(daemon, **options) as one:
        await one.send("auth", ref=1, token=token, rooms={str(room): None for room in rooms})
        await one.until("ready")
        yield one


async def burst(daemon: Daemon, rooms: list[int], count: int) -> None:
    async with trio.open_nursery() as nursery:
        for room in rooms:
            nursery.start_soon(fill, daemon, room, count, SIZE)


@pytest.mark.parametrize("count", [50, 250], ids=["400 kB", "2 MB"])
async def test_a_reader_in_ten_rooms_outlives_ten_bursts_at_once(
    daemon: Daemon, conversation: int, count: int
) -> None:
    """For somebody who takes 1 MB/s: all of it comes, in order, once."""
    rooms = [conversation * 100 + number for number in range(ROOMS)]
    async with in_rooms(daemon, rooms) as one, trio.open_nursery() as nursery:
        reader = Reader(one)
        nursery.start_soon(burst, daemon, rooms, count)
        await reader.read_until(dict.fromkeys(rooms, count))
        await fill(daemon, rooms[0], 1, 10)
        await reader.read_until({rooms[0]: count + 1})
        assert reader.seqs.pop(rooms[0]) == list(range(1, count + 2))
        assert list(reader.seqs.values()) == [list(range(1, count + 1))] * (ROOMS - 1)
        assert not reader.resets


async def test_a_trivial_client_outlives_a_burst(daemons: Daemons, conversation: int) -> None:
    """It knows no `subscribed`: the messages themselves come, as it takes them."""
    daemon = await trio.to_thread.run_sync(lambda: daemons(hub__allow_query_token="true"))
    token = await trio.to_thread.run_sync(daemon.token_for, 1)
    async with peer(daemon, f"/ws?token={token}&conversation_id={conversation}") as one:
        reader = Reader(one)
        await fill(daemon, conversation, 250, SIZE)
        await reader.read_until({conversation: 250})
        assert reader.seqs[conversation] == list(range(1, 251))


async def test_who_reads_nothing_is_closed_in_time(daemon: Daemon, conversation: int) -> None:
    """And costs no more than its outbox until then."""
    rooms = [conversation * 100 + number for number in range(ROOMS)]
    async with in_rooms(daemon, rooms, buffer=4096):
        await burst(daemon, rooms, 250)
        started = trio.current_time()
        with trio.fail_after(PING + PONG + SLACK):
            while not await closed_with(daemon, 4000):
                await trio.sleep(0.1)
        assert trio.current_time() - started > 0
    assert not await closed_with(daemon, 4002)


async def test_who_is_removed_while_behind_hears_no_more(daemons: Daemons, conversation: int) -> None:
    daemon = await trio.to_thread.run_sync(lambda: daemons(rooms__access="members"))
    member = f"/api/ws/conversations/{conversation}/members/1"
    await trio.to_thread.run_sync(daemon.request, "PUT", member)
    async with in_rooms(daemon, [conversation], buffer=4096) as one:
        await fill(daemon, conversation, 250, SIZE)
        await one.until("subscribed")
        await trio.to_thread.run_sync(daemon.request, "DELETE", member)
        await fill(daemon, conversation, 1, 10)
        assert (await one.until("unsubscribed"))["conversation_id"] == conversation
        await one.send("ping", ref=2)
        assert (await one.until("pong"))["ref"] == 2
        assert one.read < 1_000_000


async def test_a_message_that_is_larger_than_an_outbox_arrives(daemons: Daemons, conversation: int) -> None:
    """Where the operator allows such: whoever reads is not cut for it."""
    daemon = await trio.to_thread.run_sync(lambda: daemons(limits__content_chars=262_144))
    async with in_rooms(daemon, [conversation]) as one:
        reader = Reader(one)
        large = {"conversation_id": conversation, "sender_id": 2, "content": "\N{GRINNING FACE}" * 262_144}
        await trio.to_thread.run_sync(daemon.request, "POST", "/api/ws/messages/batch", {"messages": [large]})
        await fill(daemon, conversation, 1, 10)
        await reader.read_until({conversation: 2})
        assert reader.seqs[conversation] == [1, 2]
