"""The Redis side of `chat.ingest` and streams like it: the lease, the consumer groups, the refused entries.

The functions are synchronous, for one thread at a time; `consumer` calls them. One node reads at a time, so
that messages are committed in the order of XADD. It holds a lease, and first takes over the entries that the
node before it left pending.

A process may be paused between any two steps for longer than its lease lasts. So each step that changes
something in Redis is a script that also checks the lease, and commits check a fencing token in the database
(see `consumer`).
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis
import structlog
from msgspec import Struct

from chatd.bus.client import LOST, client_of
from chatd.config import Redis
from chatd.core.errors import Unavailable
from chatd.ingest.streams import DEAD, STREAM, Streams

LEASE, GROUP = "chat.ingest.reader", "chatd"

COUNT = 500  # entries per read: as many as the writer commits at once
BLOCK = 500  # ms that a read waits for entries, and that a stop has to wait for the thread
LEASE_MS = 5000  # ms; if this node does not renew its lease for so long, another node reads
DEAD_BYTES = 256 * 1024  # bytes to keep of each refused entry
DEAD_KEPT = 64 * 1024 * 1024  # bytes to keep of all refused entries; beyond it the oldest are removed

# Renews the lease (returns 1) or takes a free one (2). Returns 0 if another node holds it.
_HOLD = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) return 1 end
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 2 end
return 0
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"

# Starts each script below: returns nil if this node does not hold the lease, otherwise renews it.
_HELD = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
# Returns the next entries and the group's last delivered id. A script cannot wait for entries: see `_read_new`.
_READ = (
    _HELD
    + """
if redis.call('EXISTS', KEYS[2]) == 0 then return {{}, '0-0'} end
local read = redis.call('XREADGROUP', 'GROUP', ARGV[3], ARGV[1], 'COUNT', ARGV[4], 'STREAMS', KEYS[2], '>')
local last = '0-0'
for _, group in ipairs(redis.call('XINFO', 'GROUPS', KEYS[2])) do
  local named = {}
  for i = 1, #group, 2 do named[group[i]] = group[i + 1] end
  if named['name'] == ARGV[3] then last = named['last-delivered-id'] end
end
return {read and read[1][2] or {}, last}
"""
)
# Takes over the pending entries of all consumers. At the end it deletes other consumers
# without pending entries, because each start of a node makes a new consumer. Deleting one
# with pending entries would lose these.
_TAKE_OVER = (
    _HELD
    + """
if redis.call('EXISTS', KEYS[2]) == 0 then return {'0-0', {}} end
local claimed = redis.call('XAUTOCLAIM', KEYS[2], ARGV[3], ARGV[1], 0, ARGV[5], 'COUNT', ARGV[4])
if claimed[1] == '0-0' then
  for _, consumer in ipairs(redis.call('XINFO', 'CONSUMERS', KEYS[2], ARGV[3])) do
    local named = {}
    for i = 1, #consumer, 2 do named[consumer[i]] = consumer[i + 1] end
    if named['name'] ~= ARGV[1] and named['pending'] == 0 then
      redis.call('XGROUP', 'DELCONSUMER', KEYS[2], ARGV[3], named['name'])
    end
  end
end
return {claimed[1], claimed[2]}
"""
)
# ARGV after the first three: the number of entries, their ids, DEAD_KEPT, and for each refused entry the number
# of its arguments and the arguments. XADD comes first, because a full Redis refuses it and then nothing has
# changed. MEMORY USAGE takes a millisecond for many small entries, so the script calls it only now and then.
_SETTLE = (
    _HELD
    + """
local count = tonumber(ARGV[4])
local most, at, added = tonumber(ARGV[count + 5]), count + 6, 0
while at <= #ARGV do
  local last = at + tonumber(ARGV[at])
  redis.call('XADD', KEYS[3], '*', unpack(ARGV, at + 1, last))
  for i = at + 1, last do added = added + #ARGV[i] end
  at = last + 1
  if added > most / 64 or at > #ARGV then
    added = 0
    local length = redis.call('XLEN', KEYS[3])
    while length > 1 and redis.call('MEMORY', 'USAGE', KEYS[3], 'SAMPLES', 0) > most do
      length = math.floor(length * 3 / 4)
      redis.call('XTRIM', KEYS[3], 'MAXLEN', length)
    end
  end
end
for i = 5, count + 4 do
  redis.call('XACK', KEYS[2], ARGV[3], ARGV[i])
  redis.call('XDEL', KEYS[2], ARGV[i])
end
return 1
"""
)

T = TypeVar("T")
log = structlog.get_logger()


class Entry(Struct, frozen=True):
    """An entry of the stream.

    `payload` is None if the entry has no field `m`, or was deleted from the stream.
    """

    id: str
    payload: bytes | None
    stream: str = STREAM

    @property
    def key(self) -> str:
        """Serves where the message has no client_id. Entries of two streams may have the same id."""
        if self.stream == STREAM:
            return f"ingest:{self.id}"
        return f"ingest:{hashlib.sha256(self.stream.encode()).hexdigest()[:12]}:{self.id}"


class Refusal(Struct, frozen=True):
    """A refused entry and the reason. `code`, `message` and `field` are those of an HTTP error."""

    entry: Entry
    code: str
    message: str
    field: str | None


class IngestStream:
    """The stream as one node reads it. All methods raise Unavailable if Redis does not
    answer, and can be retried.

    `term` counts how often this node has got the lease. Between two terms, another node may have read.
    """

    def __init__(self, config: Redis, node: str) -> None:
        self._config, self.node = config, node
        self._client: redis.Redis | None = None
        self._streams = Streams(config.ingest_streams)
        # By stream: where to continue taking over pending entries, until all of them are taken over.
        self._claim_from: dict[str, bytes] = {}
        self.holding = False
        self.term = 0

    def hold(self) -> bool:
        """Renew the lease, or take it and start a new term. False: another node holds it."""
        return self._calling(self._hold)

    def read(self) -> list[Entry] | None:
        """The next entries, in order; empty if none arrives within `BLOCK`; None: this node has lost the lease.

        Entries that are not settled come again in the next term, and after `start_over`.
        """
        return self._calling(self._read)

    def start_over(self) -> None:
        """Make `read` return all unsettled entries again, before new ones."""
        self._claim_from = dict.fromkeys(self._streams, b"0-0")

    def settle(self, done: Sequence[Entry], refused: Sequence[Refusal]) -> None:
        """Remove entries of one stream, and add refused ones to `chat.ingest.dead`, all or nothing.

        Does nothing if this node has lost the lease: the node that has it settles the entries itself.
        """
        self._calling(self._settle, done, refused)

    def release(self) -> None:
        """Give the lease up, so that another node can read at once."""
        if self.holding:
            self.holding = False
            self._calling(lambda client: client.eval(_RELEASE, 1, LEASE, self.node))

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def _calling(self, work: Callable[..., T], *arguments: Any) -> T:
        try:
            if self._client is None:
                self._client = client_of(self._config)  # this, too, takes a file descriptor
            return work(self._client, *arguments)
        except LOST as error:
            self.close()
            self.start_over()  # entries that were read and not settled are pending
            raise Unavailable(f"Redis does not answer: {error}") from error

    def _hold(self, client: redis.Redis) -> bool:
        held = client.eval(_HOLD, 1, LEASE, self.node, str(LEASE_MS))
        if held == 2:
            self.term += 1
            self._begin(client)
        self._set_holding(bool(held))
        return self.holding

    def _set_holding(self, held: bool) -> None:
        if self.holding is not held:
            self.holding = held
            log.info("ingest_lease", held=held)

    def _begin(self, client: redis.Redis) -> None:
        if STREAM in self._streams:
            self._create_group(client, STREAM, make_stream=True)
        self._streams.look(client)
        self.start_over()

    def _create_group(self, client: redis.Redis, stream: str, *, make_stream: bool = False) -> None:
        try:
            client.xgroup_create(stream, GROUP, id="0", mkstream=make_stream)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise

    def _if_held(self, client: redis.Redis, script: str, stream: str, *arguments: Any) -> Any:
        """Run a script that checks the lease. Returns its result; None: this node has lost the lease."""
        lease = (self.node, str(LEASE_MS))
        found = client.eval(script, 3, LEASE, stream, DEAD, *lease, GROUP, *arguments)
        if found is None:
            self._set_holding(False)
        return found

    def _read(self, client: redis.Redis) -> list[Entry] | None:
        for stream in self._streams.look(client):
            self._claim_from[stream] = b"0-0"
        lasts: dict[Any, Any] = {}
        for stream in self._streams.by_turns():
            found = self._read_one(client, stream)
            if found is None or found[0]:
                return found and found[0]
            if stream in self._streams:
                lasts[stream] = found[1]
        if not lasts:
            time.sleep(BLOCK / 1000)
            return []
        # Wait for a new entry with XREAD, which does not deliver it to the consumer group.
        woken: Any = client.xread(lasts, count=1, block=BLOCK)
        if not woken:
            return []
        found = self._read_one(client, woken[0][0].decode())
        return found and found[0]

    def _read_one(self, client: redis.Redis, stream: str) -> tuple[list[Entry], bytes] | None:
        """Entries, pending ones first, and the last id that the group has ever been given."""
        try:
            while stream in self._claim_from:
                taken = self._if_held(client, _TAKE_OVER, stream, COUNT, self._claim_from[stream])
                if taken is None:
                    return None
                self._claim_from[stream] = taken[0]
                if taken[0] == b"0-0":
                    del self._claim_from[stream]
                if entries := _entries(taken[1], stream):
                    log.info("ingest_taken_over", entries=len(entries), stream=stream)
                    return entries, b""
            found = self._if_held(client, _READ, stream, COUNT)
            return found and (_entries(found[0], stream), found[1])
        except redis.ResponseError as error:
            if "NOGROUP" in str(error):  # it is new; or Redis was emptied, or the stream deleted
                self._create_group(client, stream)
                self._claim_from[stream] = b"0-0"
            elif not self._streams.leave_out(stream, error):
                raise
            return [], b"0-0"

    def _settle(self, client: redis.Redis, done: Sequence[Entry], refused: Sequence[Refusal]) -> None:
        entries = [*done, *(refusal.entry for refusal in refused)]
        ids = [entry.id for entry in entries]
        dead: list[str | bytes | int] = []
        for refusal in refused:
            fields = _dead(refusal)
            dead += [len(fields), *fields]
        if entries:
            self._if_held(client, _SETTLE, entries[0].stream, len(ids), *ids, DEAD_KEPT, *dead)


def _entries(raw: Sequence[tuple[bytes, list[bytes] | None] | None], stream: str) -> list[Entry]:
    found: list[Entry] = []
    for one in raw:
        if one is not None:  # Redis 6.2 returns nil for deleted entries
            id, fields = one
            pairs = dict(zip((fields or [])[::2], (fields or [])[1::2], strict=True))
            found.append(Entry(id.decode(), pairs.get(b"m"), stream))
    return found


def _dead(refusal: Refusal) -> list[str | bytes]:
    payload = refusal.entry.payload or b""
    field = ["field", refusal.field] if refusal.field else []
    other = ["stream", refusal.entry.stream] if refusal.entry.stream != STREAM else []
    why = [*other, "id", refusal.entry.id, "code", refusal.code, "message", refusal.message]
    return ["m", payload[:DEAD_BYTES], *why, *field]
