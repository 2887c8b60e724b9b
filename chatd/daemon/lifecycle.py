"""The daemon's nursery: which tasks start, in which order, and how they stop.

A stop goes through these steps, each with a deadline: stop accepting, close the clients' connections over the
drain window, finish the HTTP requests, flush the writer. Then the remaining tasks are cancelled.
"""

from __future__ import annotations

import os
import platform
import secrets
import socket
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import structlog
import trio
from structlog.typing import FilteringBoundLogger

from chatd import __version__, api
from chatd.config import Config, is_loopback, split_bind
from chatd.config.settings import Settings
from chatd.daemon import garbage, process, systemd
from chatd.daemon.assembly import assemble
from chatd.daemon.listen import address_of, open_sockets
from chatd.daemon.reload import Reload
from chatd.daemon.retention import RetentionClock
from chatd.hub.server import DRAIN_GRACE
from chatd.ingest.consumer import Consumer
from chatd.ingest.stream import IngestStream
from chatd.net.descriptors import client_slots, raise_descriptor_limit
from chatd.observe import metrics
from chatd.observe.fatal import run_fatal
from chatd.observe.sampler import Sampler
from chatd.store.database import Store
from chatd.store.write.writer import Writer

API_GRACE = 5.0  # seconds for HTTP requests, and a batch of chat.ingest, in progress
ANSWER_GRACE = 2.0  # seconds for the answers to the last writes
FLUSH_GRACE = 10.0  # seconds for commands that wait at the writer
CANCEL_GRACE = 5.0  # seconds for cancelled tasks, before the process ends without them
# Seconds that the event loop waits for the interpreter's lock while a thread runs; Python's default is 5 ms.
SWITCH_INTERVAL = 0.001

log: FilteringBoundLogger = structlog.get_logger()


async def run(
    config: Config,
    store: Store,
    read_again: Callable[[], Config],
    *,
    on_ready: Callable[[], None] = lambda: None,
) -> None:
    """Serve until SIGTERM or SIGINT. Raises OperatorError if it cannot start. Any error after that is a bug.

    SIGHUP calls `read_again` to read the configuration again.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    await Daemon(config, store, read_again).run(on_ready)


class Daemon:
    def __init__(self, config: Config, store: Store, read_again: Callable[[], Config]) -> None:
        self._config, self._store, self._node = config, store, secrets.token_hex(6)
        self._api_socket, self._hub_sockets = open_sockets(config)
        self._addresses = [address_of(one) for one in (self._api_socket, *self._hub_sockets)]
        self._stop = trio.Event()  # set when a signal asks the daemon to stop
        self._drained = trio.Event()  # set when the hub has closed all connections
        self._settings = Settings(config)
        self._parts = assemble(self._settings, store, self._node)
        self._reload = Reload(self._settings, self._parts.chat, read_again)
        self._leave = api.Leave(self._stop)
        writer, bus = self._parts.writer, self._parts.bus
        self._health = api.Health(store.read, writer, bus, self._stop, redis=bool(config.redis.url))

    async def run(self, on_ready: Callable[[], None]) -> None:
        async with trio.open_nursery() as nursery:
            started = [await nursery.start(run_fatal, *part) for wanted, *part in self._in_order() if wanted]
            nursery.start_soon(process.ping_watchdog)
            nursery.start_soon(process.follow_parent, self._stop, self._let_go)
            self._tell_ready()
            nursery.start_soon(process.tell_status, self._status)
            on_ready()
            await self._stop.wait()
            await self._end([finished for finished in started if finished is not None])
            nursery.cancel_scope.cancel()
        log.info("stopped")

    def _in_order(self) -> Iterator[tuple[Any, ...]]:
        """Yield (whether it is needed, the function to start, its arguments). A function that finishes work
        after a stop returns an event to its starter, and sets it when that work is done.
        """
        config, store, parts, stop = self._config, self._store, self._parts, self._stop
        chat, redis = parts.chat, config.redis
        backlog = store.outbox.backlog if redis.url else None
        first = os.environ.get("CHATD_WORKER_NUMBER", "1") == "1"  # the first worker, or the only process
        yield True, process.watch_signals, stop, self._reload
        yield True, parts.writer.run
        yield True, parts.bus.run, parts.receiver
        yield True, parts.services.fanout.run
        yield True, parts.services.sweep.run
        yield True, chat.presence.run
        yield True, chat.typing.run
        yield parts.presence_webhooks.needed, parts.presence_webhooks.run, self._drained
        yield True, (sampler := Sampler(parts.counts, backlog)).run
        yield first, RetentionClock(self._settings, store.retention).run
        if store.wal is not None:
            yield first, store.wal.run
        yield bool(config.webhooks.url), parts.webhooks.run, stop
        yield True, parts.hub.serve, _listeners(self._hub_sockets), client_slots(raise_descriptor_limit())
        serve = partial(api.serve, self._settings, chat, self._health, sampler, self._node)
        yield True, serve, self._api_socket, self._leave, self._drained
        ingest = Consumer(IngestStream(redis, self._node), chat.messages)
        yield bool(redis.url and redis.ingest), ingest.run, stop
        yield True, garbage.collect, lambda: parts.hub.ended + self._leave.done

    def _tell_ready(self) -> None:
        config = self._config
        metrics.BUILD.labels(__version__, platform.python_version(), _kind_of_database(config)).set(1)
        api_address, *hub_addresses = self._addresses
        bus = "redis" if config.redis.url else "memory"
        log.info("ready", node=self._node, api=api_address, hub=" ".join(hub_addresses), bus=bus)
        _warn_of_plaintext(config)
        self._reload.begin()
        systemd.ready("serving")

    async def _end(self, finishing: Sequence[trio.Event]) -> None:
        """Stop: close the hub's connections, finish the requests in progress, then flush the writer."""
        hub = self._parts.hub
        log.info("stopping", connections=len(hub.connections))
        longest = hub.drain_window() + DRAIN_GRACE + API_GRACE + FLUSH_GRACE + ANSWER_GRACE + CANCEL_GRACE
        systemd.stopping("draining", longest + 1)
        process.end_anyhow_after(longest)
        await hub.drain()
        self._drained.set()  # only now: during the drain the API serves /readyz and accepts messages
        await _wait_for(finishing, API_GRACE)
        await _flush(self._parts.writer)
        await _wait_for(finishing, ANSWER_GRACE)  # for the answers to the commands that the flush has committed

    def _let_go(self) -> None:
        """Stop accepting, and close the listening sockets."""
        self._parts.hub.let_go()
        self._leave.let_go()

    async def _status(self) -> str:
        _, found = await self._health.report()
        doing = "draining" if self._stop.is_set() else "serving"
        checks = ", ".join(f"{name} {state}" for name, state in found["checks"].items())
        return f"{doing} {len(self._parts.hub.connections)} connections; {checks}"


def _listeners(sockets: Iterable[socket.socket]) -> list[trio.SocketListener]:
    return [trio.SocketListener(trio.socket.from_stdlib_socket(one)) for one in sockets]


def _kind_of_database(config: Config) -> str:
    return "sqlite" if config.database.url.startswith("sqlite") else "postgresql"


def _warn_of_plaintext(config: Config) -> None:
    """Warn if clients may send their tokens to this port without TLS, that is, without a trusted proxy."""
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
