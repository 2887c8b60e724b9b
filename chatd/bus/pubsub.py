"""Receives signals of other nodes and payloads of other services from Redis pub/sub.

The reader runs in a thread of its own, and passes what it reads to the receiver in Trio's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import redis
import structlog
import trio
from redis.exceptions import NoPermissionError

from chatd.bus import Receiver, payloads
from chatd.bus.client import SIGNALS, SOCKET_TIMEOUT, in_thread
from chatd.bus.foreign import PREFIXED, ForeignPayloads
from chatd.config import Redis

READ_COUNT, READ_BYTES = 1000, 2 * 1024 * 1024  # limits of a batch; more would block the loop for over 10 ms
BLOCK = 0.5  # seconds that a read waits, and that a stop has to wait for the thread
# A subscription does not notice that its server is gone. So chatd pings the server after PING_AFTER seconds of
# silence, and gives the link up after PATIENCE seconds without an answer.
PING_AFTER, PATIENCE = 5.0, 5.0

log = structlog.get_logger()


class PubSubReader:
    """Subscribes to signals, and to the channels of other services."""

    def __init__(self, config: Redis, node: str, receiver: Receiver) -> None:
        self._node, self._receiver = node, receiver
        self._foreign = ForeignPayloads(config, receiver)
        self._refused: set[str] = set()  # channels of others that Redis's rules for this user forbid

    async def serve(self, client: redis.Redis, up: Callable[[], None]) -> None:
        """Receive until Redis fails; calls `up` when Redis has confirmed the subscriptions.

        Raises one of `LOST`.
        """
        with client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
            await in_thread(self._listen, pubsub, up)

    def _listen(self, pubsub: Any, up: Callable[[], None]) -> None:
        pubsub.subscribe(SIGNALS)
        self._await_confirmation(pubsub)
        for name in self._foreign.channels:
            self._try_to_hear(pubsub, pubsub.subscribe, name)
        for name in {*self._foreign.patterns, PREFIXED}:
            self._try_to_hear(pubsub, pubsub.psubscribe, name)
        trio.from_thread.run_sync(up)
        silence = _Silence()
        while True:
            trio.from_thread.check_cancelled()
            got = pubsub.get_message(timeout=BLOCK)
            if got is None:
                if silence.wants_ping():
                    pubsub.ping()
            else:
                silence.ended()
                trio.from_thread.run_sync(self._take, _batch(pubsub, got))

    def _try_to_hear(self, pubsub: Any, subscribe: Callable[[str], Any], name: str) -> None:
        """Subscribe to a channel of another service. If Redis refuses it, chatd goes on without it."""
        subscribe(name)
        try:
            self._await_confirmation(pubsub)
        except NoPermissionError as error:
            listed = name in (*self._foreign.channels, *self._foreign.patterns)
            if listed and name not in self._refused:
                self._refused.add(name)
                log.warning("redis_channel_refused", channel=name, error=str(error))

    def _await_confirmation(self, pubsub: Any) -> None:
        """Raises redis.NoPermissionError if Redis refuses the subscription, redis.TimeoutError."""
        deadline = time.monotonic() + SOCKET_TIMEOUT
        while (left := deadline - time.monotonic()) > 0:
            got = pubsub.get_message(timeout=left)
            if got is not None and got["type"] in ("subscribe", "psubscribe"):
                return
            if got is not None:
                trio.from_thread.run_sync(self._take, [got])
        raise redis.TimeoutError("Redis did not confirm a subscription")

    def _take(self, batch: list[dict[str, Any]]) -> None:
        for item in batch:
            if item["type"] not in ("message", "pmessage"):
                continue
            if item["channel"] != SIGNALS.encode():
                self._foreign.take(item)
            elif item["type"] == "message":
                signal = payloads.signal_of(item["data"])
                if signal is not None and signal.node != self._node:
                    self._receiver.signal(signal.signal)


class _Silence:
    """Measures how long a subscription has been silent, and decides when to ping."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._asked_at: float | None = None

    def ended(self) -> None:
        self._since, self._asked_at = time.monotonic(), None

    def wants_ping(self) -> bool:
        """Whether to send a ping now. Raises redis.TimeoutError if the last one got no answer in time."""
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at > PATIENCE:
                raise redis.TimeoutError(f"Redis did not answer a ping within {PATIENCE:.0f} s")
            return False
        if now - self._since <= PING_AFTER:
            return False
        self._asked_at = now
        return True


def _batch(pubsub: Any, got: dict[str, Any] | None) -> list[dict[str, Any]]:
    """`got` and the messages that have arrived after it, up to the limits of a batch."""
    batch: list[dict[str, Any]] = []
    size = 0
    while got is not None and len(batch) < READ_COUNT and size < READ_BYTES:
        batch.append(got)
        size += len(got["data"]) if isinstance(got["data"], bytes) else 0
        got = pubsub.get_message(timeout=0)
    return batch
