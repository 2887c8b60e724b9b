"""Redis: publish committed groups, receive what other nodes committed.

Three links, each a thread with a client of its own and a reconnect loop of ours:

    publish   one pipeline for all groups that wait: XADD chat.stream, PUBLISH chat.messages, signals
    stream    XREAD in batches: other nodes' changes
    pubsub    chat.signals, and chat.messages where foreign payloads are accepted

Redis is never on the way to an acknowledgement. What it loses is repaired from the database by the fanout;
what it did not take stays in the outbox until it does.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

import redis
import structlog
import trio
from msgspec import UNSET, UnsetType

from chatd.bus import Receiver, give_to, kicks, payloads
from chatd.bus.client import LOST, MESSAGES, SIGNALS, STREAM, client_of, last_id, order
from chatd.bus.signals import WaitingSignals
from chatd.bus.trimming import Trimming, trim_what_is_there
from chatd.config import Redis
from chatd.core.backoff import Backoff
from chatd.core.errors import ChatError
from chatd.core.limits import MAX_ID
from chatd.core.model import Group, Kick, MemberChange, Notice, Signal, UserChange
from chatd.observe import metrics

PROBE = "chat.probe"  # a key that never is there

QUEUE_BYTES = 32 * 1024 * 1024  # payloads that may wait for Redis; the outbox has what does not fit
PIPELINE_BYTES = 256 * 1024  # payloads in one round trip: more would keep the loop waiting for the interpreter
READ_COUNT = 1000  # entries of one XREAD: more would keep the loop busy for over 10 ms
READ_BYTES = 2 * 1024 * 1024  # of one, about: Redis counts entries, so the size of the last ones is the guess
BLOCK = 500  # ms an XREAD waits; below the socket's timeout, and how long a stop waits for the thread
BATCHES = 4  # batches read ahead of the fanout; a slow fanout slows the reader
RETRY_FIRST, RETRY_MOST = 0.1, 5.0  # seconds between attempts to connect, doubled each time, with jitter
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


class RedisBus:
    def __init__(self, config: Redis, *, node: str, outbox: Outbox) -> None:
        self._config, self._node, self._outbox = config, node, outbox
        self._receiver: Receiver
        self._waiting: deque[Group] = deque()
        self._waiting_bytes = 0
        # Rights and receipts are kept until Redis has taken them, for no outbox does. Past the bound the oldest
        # go, for the sweep. The rest is worth nothing later: while Redis is away nobody waits for it.
        self._lasting, self._passing = WaitingSignals(), WaitingSignals()
        self._kicks = kicks.Kicks(node)
        # True until everything committed before has been read from the outbox: then order is kept by its ids.
        self._behind = True
        self._relayed = 0  # own outbox rows up to here are published
        self._wake, self._passes = trio.Event(), trio.Event()
        self._links: dict[str, bool | None] = {"publish": None, "stream": None, "pubsub": None}
        self.up = False
        self._position = ""

    # Publishing.

    def publish(self, group: Group) -> None:
        give_to(self._receiver, group)
        for signal in (*group.members, *group.users, *group.notices):
            self._pass_on(signal)
        if group.changes:
            self._waiting.append(group)
            self._waiting_bytes += _size(group)
        if self._waiting_bytes > QUEUE_BYTES:
            self._fall_behind()
        self._wake.set()

    def tell(self, signal: Signal) -> None:
        self._receiver.signal(signal)
        self._pass_on(signal)
        self._wake.set()

    def _pass_on(self, signal: Signal) -> None:
        if isinstance(signal, Kick):
            self._kicks.put(signal)
        elif isinstance(signal, MemberChange | UserChange) or (isinstance(signal, Notice) and signal.lasting):
            self._lasting.append(payloads.signal(self._node, signal))
        elif self._links["publish"]:
            self._passing.append(payloads.signal(self._node, signal))
        self._passes.set()

    async def run(
        self, receiver: Receiver, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self._receiver = receiver
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep, "publish", self._publish_link)
            nursery.start_soon(self._keep, "stream", self._stream_link)
            nursery.start_soon(self._keep, "pubsub", self._pubsub_link)
            nursery.start_soon(self._relay_foreign)
            task_status.started()

    async def _keep(self, name: str, link: Callable[[redis.Redis], Awaitable[None]]) -> None:
        """Connect, serve, and when Redis fails do it again: the one thing restarted inside the process."""
        backoff = Backoff(RETRY_FIRST, RETRY_MOST)
        while True:
            started = trio.current_time()
            client = client_of(self._config)
            try:
                await link(client)
            except LOST as error:
                self._set_link(name, False, str(error))
            finally:
                client.close()
            if trio.current_time() - started > RETRY_MOST:
                backoff.reset()
            await trio.sleep(backoff.next())

    def _set_link(self, name: str, up: bool, reason: str = "") -> None:
        if self._links[name] is up:
            return
        if up and self._links[name] is False:
            metrics.REDIS_RECONNECTS.inc()
        self._links[name] = up
        log.log(
            logging.INFO if up else logging.WARNING,
            "redis_link",
            link=name,
            up=up,
            **({"error": reason} if reason else {}),
        )
        before, self.up = self.up, all(self._links.values())
        metrics.REDIS_UP.set(self.up)
        if before is not self.up or not up:
            self._receiver.links(self.up)

    async def _publish_link(self, client: redis.Redis) -> None:
        """What passes goes its own way: it needs no database, and does not wait for one that is away."""
        self._fall_behind()
        self._passing.clear()
        await self._in_thread(client.setrange, PROBE, 0, b"")  # as below
        self._set_link("publish", True)
        failures: list[Exception] = []

        async def keep(part: Callable[[redis.Redis], Awaitable[None]]) -> None:
            try:
                await part(client)
            except LOST as error:
                failures.append(error)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(keep, self._publish_groups)
            nursery.start_soon(keep, self._publish_passing)
        raise failures[0]

    async def _publish_groups(self, client: redis.Redis) -> None:
        while True:
            if self._lasting:  # first: who was removed shall not hear what comes after
                await self._send_signals(client, self._lasting)
            elif self._behind:
                await self._try_to_catch_up(client)
            elif self._waiting:
                await self._publish_waiting(client)
            else:
                self._wake = trio.Event()
                with trio.move_on_after(RELAY_EVERY):
                    await self._wake.wait()
                if not self._wake.is_set():
                    await self._in_thread(client.ping)

    async def _publish_passing(self, client: redis.Redis) -> None:
        while True:
            if self._kicks:
                await self._kicks.send(client)
            elif self._passing:
                await self._send_signals(client, self._passing)
            else:
                self._passes = trio.Event()
                await self._passes.wait()

    async def _try_to_catch_up(self, client: redis.Redis) -> None:
        try:
            await self._catch_up(client)
        except ChatError as error:  # the outbox could not be read: the database's trouble, not Redis's
            log.warning("outbox_unavailable", error=str(error))
            self._behind = True
            await trio.sleep(OUTBOX_RETRY)

    def _fall_behind(self) -> None:
        """Let go of what waits: it is in the outbox, and read from there in order."""
        self._behind = True
        self._waiting.clear()
        self._waiting_bytes = 0

    async def _catch_up(self, client: redis.Redis) -> None:
        await self._in_thread(client.setrange, PROBE, 0, b"")  # fails where Redis is full, and changes nothing
        self._behind = False  # set again by an overflow while we read

        def publish(row: Left) -> None:
            # Neither its version nor the mark before it is known any more: a node that has not told it yet
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
        await self._in_thread(self._send, client, entries)
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
                pipeline.xadd(STREAM, entry, maxlen=self._config.stream_length, approximate=True)
                pipeline.publish(MESSAGES, payloads.with_node(payload, node))
            pipeline.execute()

    async def _send_signals(self, client: redis.Redis, waiting: WaitingSignals) -> None:
        if not (taken := waiting.first()):
            return

        def send() -> None:
            with client.pipeline(transaction=False) as pipeline:
                for signal in taken:
                    pipeline.publish(SIGNALS, signal)
                pipeline.execute()

        await self._in_thread(send)
        waiting.done(taken)

    async def _relay_foreign(self) -> None:
        """What dead nodes left: `_catch_up` relays it with our own."""
        while True:
            await trio.sleep(RELAY_EVERY * random.uniform(0.8, 1.2))
            if self._links["publish"]:
                try:
                    expired = await self._outbox.expire()
                except ChatError:
                    continue  # the writer says loudly enough that the database is gone
                metrics.OUTBOX_EXPIRED.inc(expired)
                if expired:
                    log.error("outbox_expired", groups=expired)
                self._behind = True
                self._wake.set()

    # Receiving.

    async def _stream_link(self, client: redis.Redis) -> None:
        send, receive = trio.open_memory_channel[list[Any]](BATCHES)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take_batches, receive)
            try:
                await self._in_thread(self._read_stream, client, send)
            except LOST as error:
                failure = error
            nursery.cancel_scope.cancel()
        raise failure

    def _read_stream(self, client: redis.Redis, send: trio.MemorySendChannel[list[Any]]) -> None:
        last = last_id(client)
        if not self._position or order(last) < order(self._position):
            self._position = last  # the first start, or a flush: what was missed is found by the sweep
        trimming = Trimming(self._config.stream_bytes)
        trim_what_is_there(client, STREAM, self._config.stream_bytes)
        trio.from_thread.run_sync(self._set_link, "stream", True)
        count = READ_COUNT // 10  # until something is known of their size
        kicked = kicks.BEGINNING  # all that are kept: each concerns older connections only
        while True:
            trio.from_thread.check_cancelled()
            wanted: dict[Any, Any] = {STREAM: self._position, kicks.STREAM: kicked}
            reply: Any = client.xread(wanted, count=count, block=BLOCK)
            if not reply:
                last = last_id(client)
                if order(last) < order(self._position):
                    self._position, kicked = last, kicks.BEGINNING
                    trio.from_thread.run_sync(self._receiver.lost)
                continue
            for name, entries in reply:
                if name == kicks.STREAM.encode():
                    kicked = entries[-1][0].decode()
                    trio.from_thread.run_sync(self._take_kicks, kicks.heard(client, entries, self._node))
                else:
                    count = fitting_count(entries)
                    self._position = entries[-1][0].decode()
                    trio.from_thread.run(send.send, entries)
                    if cut := trimming.add(entries):
                        client.xtrim(STREAM, minid=cut, approximate=True)

    def _take_kicks(self, heard: list[Kick]) -> None:
        for kick in heard:
            self._receiver.signal(kick)

    async def _take_batches(self, receive: trio.MemoryReceiveChannel[list[Any]]) -> None:
        own = self._node.encode()
        async for entries in receive:
            others = (payloads.change_of(fields) for _, fields in entries if fields.get(b"n") != own)
            self._receiver.changes([change for change in others if change is not None])

    async def _pubsub_link(self, client: redis.Redis) -> None:
        with client.pubsub(ignore_subscribe_messages=True) as pubsub:  # type: ignore[no-untyped-call]
            await self._in_thread(self._listen, pubsub)

    def _listen(self, pubsub: Any) -> None:
        pubsub.subscribe(*([SIGNALS, MESSAGES] if self._config.accept_foreign else [SIGNALS]))
        trio.from_thread.run_sync(self._set_link, "pubsub", True)
        while True:
            trio.from_thread.check_cancelled()
            got = pubsub.get_message(timeout=BLOCK / 1000)
            batch: list[dict[str, Any]] = []
            size = 0
            while got is not None and len(batch) < READ_COUNT and size < READ_BYTES:
                batch.append(got)
                size += len(got["data"])
                got = pubsub.get_message(timeout=0)
            if batch:
                trio.from_thread.run_sync(self._take_published, batch)
            else:
                pubsub.check_health()

    def _take_published(self, batch: list[dict[str, Any]]) -> None:
        for item in batch:
            data = item["data"]
            if item["channel"] == SIGNALS.encode():
                signal = payloads.signal_of(data)
                if signal is not None and signal.node != self._node:
                    self._receiver.signal(signal.signal)
            elif foreign := payloads.foreign_of(data):
                self._receiver.foreign(*foreign)

    @staticmethod
    async def _in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
        # A limiter of its own: a thread that waits in Redis shall not take a place from anybody.
        return await trio.to_thread.run_sync(work, *arguments, limiter=trio.CapacityLimiter(1))


def _size(group: Group) -> int:
    return sum(len(change.payload) for change in group.changes)


def fitting_count(entries: Sequence[tuple[bytes, dict[bytes, bytes]]]) -> int:
    """How many entries like these make up `READ_BYTES`."""
    size = sum(len(value) for _, fields in entries for value in fields.values())
    return max(1, min(READ_COUNT, READ_BYTES * len(entries) // max(size, 1)))
