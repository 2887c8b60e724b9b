"""What comes from Redis by pub/sub: signals of other nodes, and the payloads of other services.

The reader has a thread of its own, which gives what it has heard to the receiver in trio's thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import redis
import trio

from chatd.bus import Receiver, payloads
from chatd.bus.client import MESSAGES, SIGNALS, SOCKET_TIMEOUT, in_thread
from chatd.config import Redis

READ_COUNT, READ_BYTES = 1000, 2 * 1024 * 1024  # of one batch: more would keep the loop busy for over 10 ms
BLOCK = 0.5  # seconds that a read waits; how long a stop waits for the thread
# Nothing tells a subscription that its server is gone: after so many seconds of silence chatd pings it, and
# gives the link up after so many more without an answer.
PING_AFTER, PATIENCE = 5.0, 5.0


class PubSubReader:
    """Listens to signals, and to the payloads of other services where they are accepted."""

    def __init__(self, config: Redis, node: str, receiver: Receiver) -> None:
        self._channels = [SIGNALS, MESSAGES] if config.accept_foreign else [SIGNALS]
        self._node, self._receiver = node, receiver

    async def serve(self, client: redis.Redis, up: Callable[[], None]) -> None:
        """Until Redis fails; calls `up` when Redis has confirmed the subscriptions."""
        with client.pubsub() as pubsub:  # type: ignore[no-untyped-call]
            await in_thread(self._listen, pubsub, up)

    def _listen(self, pubsub: Any, up: Callable[[], None]) -> None:
        for channel in self._channels:
            pubsub.subscribe(channel)
            self._await_confirmation(pubsub)
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

    def _await_confirmation(self, pubsub: Any) -> None:
        """Raises redis.NoPermissionError where it is refused."""
        deadline = time.monotonic() + SOCKET_TIMEOUT
        while (left := deadline - time.monotonic()) > 0:
            got = pubsub.get_message(timeout=left)
            if got is not None and got["type"] in ("subscribe", "psubscribe"):
                return
            if got is not None:
                trio.from_thread.run_sync(self._take, [got])
        raise redis.TimeoutError("a subscription was not confirmed")

    def _take(self, batch: list[dict[str, Any]]) -> None:
        for item in batch:
            data = item["data"]
            if item["type"] != "message":
                continue
            if item["channel"] == SIGNALS.encode():
                signal = payloads.signal_of(data)
                if signal is not None and signal.node != self._node:
                    self._receiver.signal(signal.signal)
            elif foreign := payloads.foreign_of(data):
                self._receiver.foreign(*foreign)


class _Silence:
    """How long a subscription has been silent, and whether a ping is under way."""

    def __init__(self) -> None:
        self._since = time.monotonic()
        self._asked_at: float | None = None

    def ended(self) -> None:
        self._since, self._asked_at = time.monotonic(), None

    def wants_ping(self) -> bool:
        """Raises redis.TimeoutError where a ping stays without an answer."""
        now = time.monotonic()
        if self._asked_at is not None:
            if now - self._asked_at > PATIENCE:
                raise redis.TimeoutError(f"a ping was not answered in {PATIENCE:.0f} s")
            return False
        if now - self._since <= PING_AFTER:
            return False
        self._asked_at = now
        return True


def _batch(pubsub: Any, got: dict[str, Any] | None) -> list[dict[str, Any]]:
    """This message, and those that have come already."""
    batch: list[dict[str, Any]] = []
    size = 0
    while got is not None and len(batch) < READ_COUNT and size < READ_BYTES:
        batch.append(got)
        size += len(got["data"]) if isinstance(got["data"], bytes) else 0
        got = pubsub.get_message(timeout=0)
    return batch
