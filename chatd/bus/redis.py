"""The bus over Redis: publishes committed groups, and receives those of other nodes.

It has three links, each with a client of its own, which chatd reconnects by itself:

    publish   sends waiting groups in one pipeline, and signals: see `publisher`
    stream    reads changes of other nodes, and kicks, with XREAD: see `readers`
    pubsub    receives chat.signals, and with `redis.accept_foreign` chat.messages: see `pubsub`

An acknowledgement to a client never waits for Redis. If Redis loses changes, the fanout reads them from the
database. If Redis does not take a group, the group stays in the outbox.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import closing
from functools import partial

import redis
import structlog
import trio

from chatd.bus import Receiver, give_to, rights
from chatd.bus.client import LOST, client_of, in_thread
from chatd.bus.publisher import Outbox, Publisher
from chatd.bus.pubsub import PubSubReader
from chatd.bus.readers import StreamReader
from chatd.config import Redis
from chatd.core.backoff import Backoff
from chatd.core.model import Group, Signal
from chatd.observe import metrics
from chatd.observe.fatal import run_fatal

RETRY_FIRST, RETRY_MOST = 0.1, 5.0  # seconds between attempts to connect

log = structlog.get_logger()

# Serves one link with a client until Redis fails; calls the given function when Redis answers.
Link = Callable[[redis.Redis, Callable[[], None]], Awaitable[None]]


class RedisBus:
    """The bus over Redis. `up`: all three links are up."""

    def __init__(self, config: Redis, *, node: str, outbox: Outbox) -> None:
        self._config, self._node = config, node
        self._publisher = Publisher(node, outbox, stream_length=config.stream_length)
        self._receiver: Receiver
        self._links: dict[str, bool | None] = {"publish": None, "stream": None, "pubsub": None}
        self.up = False

    def publish(self, group: Group) -> None:
        give_to(self._receiver, group)
        self._publisher.publish(group)

    def tell(self, signal: Signal) -> None:
        self._receiver.signal(signal)
        self._publisher.tell(signal)

    async def run(
        self, receiver: Receiver, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        self._receiver = receiver
        stream = StreamReader(self._config, self._node, receiver)
        pubsub = PubSubReader(self._config, self._node, receiver)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_fatal, self._keep, "publish", self._publisher.serve)
            nursery.start_soon(run_fatal, self._keep, "stream", stream.serve)
            nursery.start_soon(run_fatal, self._keep, "pubsub", pubsub.serve)
            nursery.start_soon(run_fatal, self._publisher.relay_foreign)
            nursery.start_soon(run_fatal, self._check_rights)
            task_status.started()

    async def _check_rights(self) -> None:
        """Log once what Redis does not allow: a link says only what it stumbles over first."""
        while True:
            try:
                missing = await in_thread(rights.missing, self._config)
            except LOST:
                await trio.sleep(RETRY_MOST)
                continue
            if missing:
                advice = f"ACL SETUSER {rights.user(self._config)} {' '.join(missing)}"
                log.error("redis_rights_missing", rights=missing, advice=advice)
            return

    async def _keep(self, name: str, link: Link) -> None:
        """Keep one link connected: when Redis fails, reconnect with backoff.

        No other task restarts in the process.
        """
        backoff = Backoff(RETRY_FIRST, RETRY_MOST)
        while True:
            started = trio.current_time()
            try:
                with closing(client_of(self._config)) as client:  # this, too, takes a file descriptor
                    await link(client, partial(self._set_link, name, True))
            except LOST as error:
                self._set_link(name, False, str(error))
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
