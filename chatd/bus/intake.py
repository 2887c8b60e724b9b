"""The Redis side of `chat.ingest`: who reads it, what waits in it, what was done with it.

Synchronous, for one thread at a time; `chatd.ingest` calls it. One node reads at a time, so that messages are
committed in the order of XADD: it holds a lease, and takes over first what its forerunner left pending.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis
import structlog
from msgspec import Struct

from chatd.bus.redis import LOST, client_of
from chatd.config import Redis
from chatd.errors import Unavailable

STREAM, DEAD, LEASE, GROUP = "chat.ingest", "chat.ingest.dead", "chat.ingest.reader", "chatd"

COUNT = 500  # entries of one read: what the writer commits at once
BLOCK = 500  # ms that a read waits for entries; how long a stop waits for the thread
LEASE_MS = 5000  # after which another node reads, if this one has not renewed it
DEAD_KEPT = 10_000  # refused entries, about
DEAD_BYTES = 256 * 1024  # that are kept of one

# Renews the lease or takes a free one: 1 or 2, and 0 where another node holds it.
_HOLD = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) return 1 end
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 2 end
return 0
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"

T = TypeVar("T")
log = structlog.get_logger()


class Entry(Struct, frozen=True):
    """`payload` is None where the entry has no field `m`, or is gone from the stream."""

    id: str
    payload: bytes | None


class Refusal(Struct, frozen=True):
    """Why an entry goes to the dead ones. `code` and `message` as an HTTP error has them."""

    entry: Entry
    code: str
    message: str
    field: str | None


class Intake:
    """All methods raise Unavailable where Redis does not answer, and may be called again."""

    def __init__(self, config: Redis, node: str) -> None:
        self._config, self._node = config, node
        self._client: redis.Redis | None = None
        self._claim_from: bytes | None = None  # where to go on taking over; None: all of it is taken
        self.holding = False

    def read(self) -> list[Entry] | None:
        """The next entries, in order; none where nothing comes for a while, None while another node reads.

        What is not settled comes again.
        """
        return self._calling(self._read)

    def hold(self) -> bool:
        """Renew the lease; False when another node has it."""
        return self._calling(self._hold)

    def settle(self, done: Sequence[Entry], refused: Sequence[Refusal]) -> None:
        """Take the entries out of the stream; refused ones go to the dead. All or nothing."""
        self._calling(self._settle, done, refused)

    def release(self) -> None:
        """Let another node read at once."""
        if self.holding:
            self.holding = False
            self._calling(lambda client: client.eval(_RELEASE, 1, LEASE, self._node))

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _calling(self, work: Callable[..., T], *arguments: Any) -> T:
        if self._client is None:
            self._client = client_of(self._config)
        try:
            return work(self._client, *arguments)
        except LOST as error:
            self.close()
            self._claim_from = b"0-0"  # what was read and not settled is pending
            raise Unavailable(f"Redis does not answer: {error}") from error

    def _hold(self, client: redis.Redis) -> bool:
        held = client.eval(_HOLD, 1, LEASE, self._node, str(LEASE_MS))
        if held == 2:
            self._begin(client)
        if self.holding is not bool(held):
            self.holding = bool(held)
            log.info("ingest_lease", held=self.holding)
        return self.holding

    def _begin(self, client: redis.Redis) -> None:
        try:
            client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self._claim_from = b"0-0"

    def _read(self, client: redis.Redis) -> list[Entry] | None:
        if not self._hold(client):
            return None
        try:
            return self._take_over(client) or self._read_new(client)
        except redis.ResponseError as error:
            if not str(error).startswith("NOGROUP"):  # Redis was emptied, or the stream deleted
                raise
            self._begin(client)
            return []

    def _take_over(self, client: redis.Redis) -> list[Entry]:
        """What others, or this node before Redis went away, had read and not settled, in order."""
        while self._claim_from is not None:
            claimed: Any = client.xautoclaim(STREAM, GROUP, self._node, 0, self._claim_from, COUNT)
            self._claim_from = claimed[0] if claimed[0] != b"0-0" else None
            if self._claim_from is None:
                self._forget_consumers(client)
            if entries := _entries(claimed[1]):
                log.info("ingest_taken_over", entries=len(entries))
                return entries
        return []

    def _forget_consumers(self, client: redis.Redis) -> None:
        """Each start of a node is a consumer of its own: those that left nothing go."""
        consumers: Any = client.xinfo_consumers(STREAM, GROUP)
        for consumer in consumers:
            if consumer["name"].decode() != self._node and not consumer["pending"]:
                client.xgroup_delconsumer(STREAM, GROUP, consumer["name"])

    def _read_new(self, client: redis.Redis) -> list[Entry]:
        reply: Any = client.xreadgroup(GROUP, self._node, {STREAM: ">"}, count=COUNT, block=BLOCK)
        return _entries(reply[0][1]) if reply else []

    def _settle(self, client: redis.Redis, done: Sequence[Entry], refused: Sequence[Refusal]) -> None:
        ids = [entry.id for entry in done] + [refusal.entry.id for refusal in refused]
        with client.pipeline(transaction=True) as pipeline:
            for refusal in refused:
                pipeline.xadd(DEAD, _dead(refusal), maxlen=DEAD_KEPT, approximate=True)
            pipeline.xack(STREAM, GROUP, *ids)
            pipeline.xdel(STREAM, *ids)
            pipeline.execute()


def _entries(raw: Sequence[tuple[bytes, dict[bytes, bytes] | None]]) -> list[Entry]:
    return [Entry(id.decode(), (fields or {}).get(b"m")) for id, fields in raw]


def _dead(refusal: Refusal) -> dict[Any, Any]:
    payload = refusal.entry.payload or b""
    field = {"field": refusal.field} if refusal.field else {}
    why = {"id": refusal.entry.id, "code": refusal.code, "message": refusal.message}
    return {"m": payload[:DEAD_BYTES], **why, **field}
