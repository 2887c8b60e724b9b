"""The one nursery: what starts, in which order, and how it ends.

Stopping is a protocol, not a cancel: stop accepting, say goodbye to the clients over the drain window, finish
the HTTP requests, flush the writer, each under a deadline; then cancel what is left.
"""

from __future__ import annotations

import os
import platform
import secrets
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import structlog
import trio
from structlog.typing import FilteringBoundLogger

from chatd import __version__, api
from chatd.backend.fetch import Fetcher
from chatd.backend.webhooks import WebhookDelivery
from chatd.bus import Bus, Receiver
from chatd.bus.memory import MemoryBus
from chatd.bus.redis import RedisBus
from chatd.chat.chat import Chat
from chatd.chat.presence import Presence
from chatd.config import Config, is_loopback, split_bind
from chatd.config.settings import Settings
from chatd.core.model import Group
from chatd.daemon import garbage, process, systemd
from chatd.daemon.listen import address_of, open_sockets
from chatd.daemon.reload import Reload
from chatd.daemon.retention import RetentionClock
from chatd.hub.admission.registry import Registry
from chatd.hub.fanout.fanout import Fanout
from chatd.hub.fanout.rooms import Rooms
from chatd.hub.receiver import BusReceiver
from chatd.hub.server import DRAIN_GRACE, Hub
from chatd.ingest.consumer import Consumer
from chatd.ingest.stream import IngestStream
from chatd.net.descriptors import client_slots, raise_descriptor_limit
from chatd.observe import metrics
from chatd.observe.sampler import Counts, Sampler
from chatd.store.database import Store
from chatd.store.write.writer import Writer

API_GRACE = 5.0  # seconds for HTTP requests, and a batch of chat.ingest, in progress
ANSWER_GRACE = 2.0  # seconds for the answers to what was written last
FLUSH_GRACE = 10.0  # seconds for what waits at the writer
CANCEL_GRACE = 5.0  # seconds for the rest, before the process ends anyhow
# A worker thread lets the loop wait this long for the interpreter, in seconds; Python's default is 5 ms.
SWITCH_INTERVAL = 0.001

log: FilteringBoundLogger = structlog.get_logger()


async def run(
    config: Config,
    store: Store,
    read_again: Callable[[], Config],
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT. Raises OperatorError before it is ready, nothing foreseen after.

    `read_again` reads the configuration anew, for SIGHUP.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    api_socket, hub_sockets = open_sockets(config)
    addresses = [address_of(one) for one in (api_socket, *hub_sockets)]
    node = secrets.token_hex(6)
    stop, api_stop = trio.Event(), trio.Event()

    settings = Settings(config)
    parts = assemble(settings, store, node)
    reload = Reload(settings, parts.chat, read_again)
    chat, hub, bus, writer = parts.chat, parts.hub, parts.bus, parts.writer
    ingest = Consumer(IngestStream(config.redis, node), chat.messages)
    sampler = Sampler(partial(_counts, parts, store), store.outbox.backlog if config.redis.url else None)
    _tell_build(config)
    health = api.Health(store.read, writer, bus, stop, redis=bool(config.redis.url))

    async with trio.open_nursery() as nursery:
        await nursery.start(process.watch_signals, stop, reload)
        await nursery.start(writer.run)
        await nursery.start(bus.run)
        await nursery.start(parts.fanout.run)
        await nursery.start(chat.presence.run)
        await nursery.start(chat.typing.run)
        await _start_or_finish(nursery, chat.presence_webhooks, chat.presence_webhooks.needed, api_stop)
        await nursery.start(sampler.run)
        if os.environ.get("CHATD_WORKER_NUMBER", "1") == "1":
            await nursery.start(RetentionClock(settings, store.retention).run)
            if store.wal is not None:
                await nursery.start(store.wal.run)
        await _start_or_finish(nursery, parts.webhooks, bool(config.webhooks.url), stop)
        listeners = [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in hub_sockets]
        await nursery.start(hub.serve, listeners, client_slots(raise_descriptor_limit()))
        serve_api = partial(api.serve, settings, chat, health, sampler, node)
        leave = api.Leave(stop)
        api_served = await nursery.start(serve_api, api_socket, leave, api_stop)
        await _start_or_finish(nursery, ingest, bool(config.redis.url and config.redis.ingest), stop)
        nursery.start_soon(process.ping_watchdog)
        nursery.start_soon(process.follow_parent, stop, partial(_let_go, hub, leave))
        await nursery.start(garbage.collect, lambda: hub.ended + leave.done)
        log.info(
            "ready",
            node=node,
            api=addresses[0],
            hub=" ".join(addresses[1:]),
            bus="redis" if config.redis.url else "memory",
        )
        _warn_of_plaintext(config)
        reload.begin()
        systemd.ready("serving")
        nursery.start_soon(process.tell_status, partial(_status, hub, health, stop))
        on_ready()

        await stop.wait()
        log.info("stopping", connections=len(hub.connections))
        longest = hub.drain_window() + DRAIN_GRACE + API_GRACE + FLUSH_GRACE + ANSWER_GRACE + CANCEL_GRACE
        systemd.stopping("draining", longest + 1)
        process.end_anyhow_after(longest)
        await hub.drain()
        api_stop.set()  # not before: /readyz tells the proxy of the drain, and posts still find their room
        in_progress = (api_served, chat.presence_webhooks.finished, ingest.finished, parts.webhooks.finished)
        await _wait_for(in_progress, API_GRACE)
        await _flush(writer)
        await _wait_for(in_progress, ANSWER_GRACE)  # what was committed just now is answered
        nursery.cancel_scope.cancel()
    log.info("stopped")


@dataclass(frozen=True)
class Parts:
    """What serves the chat, before it runs. None of it waits for anything yet."""

    writer: Writer
    bus: Bus
    chat: Chat
    fanout: Fanout
    registry: Registry
    hub: Hub
    webhooks: WebhookDelivery


def assemble(settings: Settings, store: Store, node: str) -> Parts:
    config = settings.now
    rooms = Rooms()
    fanout = Fanout(rooms, store.read)
    # Over the memory bus there are no other nodes to tell.
    presence = Presence(node, (lambda signal: bus.tell(signal)) if config.redis.url else None)
    fetch = Fetcher(config.server.private_networks)
    registry = Registry(settings, presence)
    fanout.addressed = registry.subscriptions_of
    receiver = BusReceiver(fanout, registry, presence)
    writer, bus = _writer_and_bus(config, store, receiver, node, lambda: webhooks.wake())
    chat = Chat(settings, store, writer, presence, bus.tell, fetch)
    hub = Hub(settings, chat, rooms, fanout, registry)
    receiver.audiences = hub.audiences
    fanout.sweep.also = hub.check_standings
    webhooks = WebhookDelivery(config.webhooks, store.webhooks, fetch)
    chat.presence_webhooks.full, chat.presence_webhooks.told = (lambda: webhooks.full), webhooks.wake
    return Parts(writer, bus, chat, fanout, registry, hub, webhooks)


def _writer_and_bus(
    config: Config, store: Store, receiver: Receiver, node: str, wake_webhooks: Callable[[], None]
) -> tuple[Writer, Bus]:
    """The writer tells the bus of commits, the bus tells the writer what it has passed on."""
    bus: Bus

    def committed(group: Group) -> None:
        bus.publish(group)
        if group.hooked:
            wake_webhooks()

    told = frozenset[str](config.webhooks.events if config.webhooks.url else ())
    writer = store.writer(node=node if config.redis.url else None, on_commit=committed, told=told)
    if not config.redis.url:
        metrics.REDIS_UP.set(1)
        bus = MemoryBus(receiver)
        return writer, bus
    bus = RedisBus(config.redis, receiver, node=node, outbox=store.outbox, settle=writer.settle)
    return writer, bus


def _let_go(hub: Hub, leave: api.Leave) -> None:
    hub.let_go()
    leave.let_go()


def _counts(parts: Parts, store: Store) -> Counts:
    rooms = parts.fanout.rooms
    return Counts(len(rooms), rooms.subscriptions, parts.registry.present, store.read.in_use)


def _tell_build(config: Config) -> None:
    database = "sqlite" if config.database.url.startswith("sqlite") else "postgresql"
    metrics.BUILD.labels(__version__, platform.python_version(), database).set(1)


class Stoppable(Protocol):
    """Runs until it is told to stop, and says when it has finished."""

    finished: trio.Event

    async def run(
        self, stop: trio.Event, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None: ...


async def _start_or_finish(nursery: trio.Nursery, part: Stoppable, wanted: bool, stop: trio.Event) -> None:
    if wanted:
        await nursery.start(part.run, stop)
    else:
        part.finished.set()


def _warn_of_plaintext(config: Config) -> None:
    """Tokens go over this port: a proxy is to end TLS before it, and to be the only one who reaches it."""
    host, _ = split_bind(config.hub.bind)
    if not is_loopback(host) and not config.limits.trusted_proxies:
        advice = "put a TLS proxy in front, and name it in limits.trusted_proxies"
        log.warning("no_tls", bind=config.hub.bind, advice=advice)


async def _wait_for(events: Iterable[trio.Event], seconds: float) -> None:
    with trio.move_on_after(seconds):
        for event in events:
            await event.wait()


async def _flush(writer: Writer) -> None:
    writer.close()
    with trio.move_on_after(FLUSH_GRACE):
        await writer.finished.wait()


async def _status(hub: Hub, health: api.Health, stop: trio.Event) -> str:
    _, found = await health.report()
    doing = "draining" if stop.is_set() else "serving"
    checks = ", ".join(f"{name} {state}" for name, state in found["checks"].items())
    return f"{doing} {len(hub.connections)} connections; {checks}"
