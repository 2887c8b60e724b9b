"""Publishes committed groups, in their order, and signals to Redis.

One pipeline sends all waiting groups: XADD chat.stream, PUBLISH chat.messages. The outbox has each group until
Redis has it, so groups that do not fit into the queue here, or that Redis refused, are read from there. Changes
of rights and receipts are not in the outbox, so they wait here until Redis has them. Their queue is bounded: it
drops the oldest, and the sweep makes up for them. Other signals are worthless later, so they do not wait while
Redis is down.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

import redis
import structlog
import trio
from msgspec import UNSET, UnsetType

from chatd.bus import payloads
from chatd.bus.client import LOST, MESSAGES, SIGNALS, STREAM, in_thread
from chatd.bus.kicks import Kicks
from chatd.bus.signals import WaitingSignals
from chatd.core.errors import ChatError
from chatd.core.limits import MAX_ID
from chatd.core.model import Group, Kick, MemberChange, Notice, Signal, UserChange
from chatd.observe import metrics
from chatd.observe.fatal import run_fatal

PROBE = "chat.probe"  # a key that never exists

QUEUE_BYTES = 32 * 1024 * 1024  # bytes of payloads that wait here for Redis; the outbox has the others
PIPELINE_BYTES = 256 * 1024  # bytes of payloads per round trip; more would hold the GIL for too long
OUTBOX_RETRY = 1.0  # seconds between attempts to read the outbox while the database is down
RELAY_EVERY = 5.0  # seconds between checks for groups that dead nodes left in the outbox

log = structlog.get_logger()


class Left(Protocol):
    """A group from the outbox."""

    @property
    def id(self) -> int: ...
    @property
    def node(self) -> str: ...
    @property
    def payloads(self) -> list[bytes]: ...


class Outbox(Protocol):
    """The store's interface for groups that Redis does not have yet; see `store.queues.outbox`."""

    async def relay(self, publish: Callable[[Any], None], *, node: str, above: int = 0) -> tuple[int, int]: ...
    async def expire(self) -> int: ...
    def settle(self, ids: Iterable[int]) -> None:
        """These rows are published: a later commit removes them."""


class Publisher:
    def __init__(self, node: str, outbox: Outbox, *, stream_length: int) -> None:
        self._node, self._outbox, self._stream_length = node, outbox, stream_length
        self._waiting: deque[Group] = deque()
        self._waiting_bytes = 0
        self._lasting, self._passing = WaitingSignals(), WaitingSignals()
        self._kicks = Kicks(node)
        # True while older groups must first be read from the outbox, whose ids keep the order.
        self._behind = True
        self._relayed = 0  # this node's outbox rows up to this id are published
        self._connected = False
        self._wake, self._passes = trio.Event(), trio.Event()

    # Input. These functions are synchronous.

    def publish(self, group: Group) -> None:
        for signal in (*group.members, *group.users, *group.notices):
            self._pass_on(signal)
        if group.changes:
            self._waiting.append(group)
            self._waiting_bytes += _size(group)
        if self._waiting_bytes > QUEUE_BYTES:
            self._fall_behind()
        self._wake.set()

    def tell(self, signal: Signal) -> None:
        self._pass_on(signal)
        self._wake.set()

    def _pass_on(self, signal: Signal) -> None:
        if isinstance(signal, Kick):
            self._kicks.put(signal)
        elif isinstance(signal, MemberChange | UserChange) or (isinstance(signal, Notice) and signal.lasting):
            self._lasting.append(payloads.signal(self._node, signal))
        elif self._connected:
            self._passing.append(payloads.signal(self._node, signal))
        self._passes.set()

    # The link to Redis.

    async def serve(self, client: redis.Redis, up: Callable[[], None]) -> None:
        """Publish until Redis fails; calls `up` when it answers. Raises one of `LOST`.

        Passing signals have a task of their own, so that they need not wait for a database that is down.
        """
        self._fall_behind()
        self._passing.clear()
        await in_thread(client.setrange, PROBE, 0, b"")  # see `_catch_up`
        up()
        failures: list[Exception] = []

        async def keep(part: Callable[[redis.Redis], Awaitable[None]]) -> None:
            try:
                await part(client)
            except LOST as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        self._connected = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_fatal, keep, self._publish_groups)
                nursery.start_soon(run_fatal, keep, self._publish_passing)
        finally:
            self._connected = False
        raise failures[0]

    async def relay_foreign(self) -> None:
        """Make `_catch_up` run every few seconds, because it also publishes groups that dead nodes left."""
        while True:
            await trio.sleep(RELAY_EVERY * random.uniform(0.8, 1.2))
            if self._connected:
                try:
                    expired = await self._outbox.expire()
                except ChatError:
                    continue  # the writer reports that the database is gone
                metrics.OUTBOX_EXPIRED.inc(expired)
                if expired:
                    log.error("outbox_expired", groups=expired)
                self._behind = True
                self._wake.set()

    async def _publish_groups(self, client: redis.Redis) -> None:
        while True:
            if self._lasting:  # first, so that a removed user does not get later messages
                await _send_signals(client, self._lasting)
            elif self._behind:
                await self._try_to_catch_up(client)
            elif self._waiting:
                await self._publish_waiting(client)
            else:
                self._wake = trio.Event()
                with trio.move_on_after(RELAY_EVERY):
                    await self._wake.wait()
                if not self._wake.is_set():
                    await in_thread(client.ping)

    async def _publish_passing(self, client: redis.Redis) -> None:
        while True:
            if self._kicks:
                await self._kicks.send(client)
            elif self._passing:
                await _send_signals(client, self._passing)
            else:
                self._passes = trio.Event()
                await self._passes.wait()

    async def _try_to_catch_up(self, client: redis.Redis) -> None:
        try:
            await self._catch_up(client)
        except ChatError as error:  # the database has failed, not Redis
            log.warning("outbox_unavailable", error=str(error))
            self._behind = True
            await trio.sleep(OUTBOX_RETRY)

    def _fall_behind(self) -> None:
        """Drop the waiting groups. They are in the outbox, from which `_catch_up` publishes them in order."""
        self._behind = True
        self._waiting.clear()
        self._waiting_bytes = 0

    async def _catch_up(self, client: redis.Redis) -> None:
        await in_thread(client.setrange, PROBE, 0, b"")  # changes nothing, but fails if Redis is full
        self._behind = False  # an overflow in the meantime sets it again

        def publish(row: Left) -> None:
            # The outbox has neither members_version nor the mark of the change before. With these values, a
            # node that has not delivered the change yet reads it from the database, with the rights.
            self._send(client, [(row.node, payload, MAX_ID, UNSET) for payload in row.payloads])

        while True:
            count, self._relayed = await self._outbox.relay(publish, node=self._node, above=self._relayed)
            if not count:
                return
            metrics.OUTBOX_RELAYED.inc(count)

    async def _publish_waiting(self, client: redis.Redis) -> None:
        taken = self._take()
        fresh = [group for group in taken if group.outbox_id is not None and group.outbox_id > self._relayed]
        entries = [
            (self._node, change.payload, change.members_version, change.previous)
            for group in fresh
            for change in group.changes
        ]
        await in_thread(self._send, client, entries)
        if ids := [group.outbox_id for group in fresh if group.outbox_id is not None]:
            self._relayed = ids[-1]
            self._outbox.settle(ids)

    def _take(self) -> list[Group]:
        taken: list[Group] = []
        size = 0
        while self._waiting and (not taken or size + _size(self._waiting[0]) <= PIPELINE_BYTES):
            taken.append(self._waiting.popleft())
            size += _size(taken[-1])
        self._waiting_bytes -= size
        return taken

    def _send(
        self, client: redis.Redis, entries: Sequence[tuple[str, bytes, int, str | UnsetType | None]]
    ) -> None:
        """Publish changes, given as (node, payload, members_version, previous mark)."""
        # A transaction sends all or nothing. Without it, a full Redis refuses XADD but accepts PUBLISH, and
        # each retry would publish again.
        with client.pipeline(transaction=True) as pipeline:
            for node, payload, version, previous in entries:
                entry = payloads.entry(payload, node, version, previous)
                pipeline.xadd(STREAM, entry, maxlen=self._stream_length, approximate=True)
                pipeline.publish(MESSAGES, payloads.with_node(payload, node))
            pipeline.execute()


async def _send_signals(client: redis.Redis, waiting: WaitingSignals) -> None:
    if not (taken := waiting.first()):
        return

    def send() -> None:
        with client.pipeline(transaction=False) as pipeline:
            for signal in taken:
                pipeline.publish(SIGNALS, signal)
            pipeline.execute()

    await in_thread(send)
    waiting.done(taken)


def _size(group: Group) -> int:
    return sum(len(change.payload) for change in group.changes)
