"""What goes to Redis: committed groups in their order, and signals.

One pipeline takes what waits: XADD chat.stream, PUBLISH chat.messages. A group is in the outbox until Redis has
it, so what does not fit here, or was not taken, is read from there. Rights and receipts are kept until Redis
has taken them, for no outbox has them. Past their bound the oldest go, which the sweep repairs. The other
signals are worth nothing later: while Redis is away none of them waits.
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

PROBE = "chat.probe"  # a key that never is there

QUEUE_BYTES = 32 * 1024 * 1024  # payloads that may wait for Redis; the outbox has what does not fit
PIPELINE_BYTES = 256 * 1024  # payloads in one round trip: more would keep the loop waiting for the interpreter
OUTBOX_RETRY = 1.0  # seconds between attempts to read the outbox, while the database is away
RELAY_EVERY = 5.0  # seconds between looks for what dead nodes left in the outbox

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
    """What the store offers for groups that Redis has not taken."""

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
        # True until everything committed before has been read from the outbox: then order is kept by its ids.
        self._behind = True
        self._relayed = 0  # own outbox rows up to here are published
        self._connected = False
        self._wake, self._passes = trio.Event(), trio.Event()

    # Input: synchronous.

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
        """Until Redis fails; calls `up` when it answers. Signals that pass go their own way: they need no
        database, and do not wait for one that is away.
        """
        self._fall_behind()
        self._passing.clear()
        await in_thread(client.setrange, PROBE, 0, b"")  # as below
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
                nursery.start_soon(keep, self._publish_groups)
                nursery.start_soon(keep, self._publish_passing)
        finally:
            self._connected = False
        raise failures[0]

    async def relay_foreign(self) -> None:
        """What dead nodes left: `_catch_up` relays it with our own."""
        while True:
            await trio.sleep(RELAY_EVERY * random.uniform(0.8, 1.2))
            if self._connected:
                try:
                    expired = await self._outbox.expire()
                except ChatError:
                    continue  # the writer logs that the database is gone
                metrics.OUTBOX_EXPIRED.inc(expired)
                if expired:
                    log.error("outbox_expired", groups=expired)
                self._behind = True
                self._wake.set()

    async def _publish_groups(self, client: redis.Redis) -> None:
        while True:
            if self._lasting:  # first: who was removed shall not hear what comes after
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
        except ChatError as error:  # the outbox could not be read: the database has failed, not Redis
            log.warning("outbox_unavailable", error=str(error))
            self._behind = True
            await trio.sleep(OUTBOX_RETRY)

    def _fall_behind(self) -> None:
        """Let go of what waits: it is in the outbox, and read from there in order."""
        self._behind = True
        self._waiting.clear()
        self._waiting_bytes = 0

    async def _catch_up(self, client: redis.Redis) -> None:
        await in_thread(client.setrange, PROBE, 0, b"")  # fails where Redis is full, and changes nothing
        self._behind = False  # set again by an overflow while we read

        def publish(row: Left) -> None:
            # Neither its version nor the mark before it is known any more: a node that has not pushed it yet
            # reads it from the database, with the rights.
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
        """`entries` are (node, payload, members_version, the mark of the change before)."""
        # A transaction, for all of it or nothing: a full Redis refuses XADD and would take PUBLISH, and what is
        # tried again would be published each time.
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
