"""The Redis side of `chat.ingest`: who reads it, what waits in it, what was done with it.

Synchronous, for one thread at a time; `consumer` calls it. One node reads at a time, so that messages are
committed in the order of XADD: it holds a lease, and takes over first what its forerunner left pending.

A process may be paused between any two of its steps, for longer than its lease lasts. So each step that changes
something in Redis is a script that looks at the lease first, in the same moment; and what was read is committed
under a fencing token, which the database checks (see `consumer`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import redis
import structlog
from msgspec import Struct

from chatd.bus.client import LOST, client_of
from chatd.config import Redis
from chatd.core.errors import Unavailable

STREAM, DEAD, LEASE, GROUP = "chat.ingest", "chat.ingest.dead", "chat.ingest.reader", "chatd"

COUNT = 500  # entries of one read: what the writer commits at once
BLOCK = 500  # ms that a read waits for entries; how long a stop waits for the thread
LEASE_MS = 5000  # after which another node reads, if this one has not renewed it
DEAD_BYTES = 256 * 1024  # that are kept of one refused entry, and
DEAD_KEPT = 64 * 1024 * 1024  # of all of them: the oldest go

# Renews the lease or takes a free one: 1 or 2, and 0 where another node holds it.
_HOLD = """
if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('PEXPIRE', KEYS[1], ARGV[2]) return 1 end
if redis.call('SET', KEYS[1], ARGV[1], 'NX', 'PX', ARGV[2]) then return 2 end
return 0
"""
_RELEASE = "if redis.call('GET', KEYS[1]) == ARGV[1] then redis.call('DEL', KEYS[1]) end"

# Begins each script below: nil where another node holds the lease, otherwise it is renewed.
_HELD = """
if redis.call('GET', KEYS[1]) ~= ARGV[1] then return false end
redis.call('PEXPIRE', KEYS[1], ARGV[2])
"""
# The next entries, and the last id that the group has ever been given. A script cannot wait for entries.
_READ = (
    _HELD
    + """
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
# Takes over what is pending, whoever has read it. At the end consumers that have nothing pending go: each start
# of a node is a consumer of its own. To delete one that has something pending would lose that.
_TAKE_OVER = (
    _HELD
    + """
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
# ARGV after the first three: how many entries, their ids, the most bytes of the dead ones, and for each refused
# entry the number of its arguments and these. XADD comes first: it is what a full Redis refuses. To ask for the
# size takes a millisecond where many small ones are kept, so it is asked for once in a while.
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
    """`payload` is None where the entry has no field `m`, or is gone from the stream."""

    id: str
    payload: bytes | None


class Refusal(Struct, frozen=True):
    """Why an entry goes to the dead ones. `code` and `message` as an HTTP error has them."""

    entry: Entry
    code: str
    message: str
    field: str | None


class IngestStream:
    """All methods raise Unavailable where Redis does not answer, and may be called again.

    `term` counts how often this node has begun to read: what another node has done in between is not known.
    """

    def __init__(self, config: Redis, node: str) -> None:
        self._config, self.node = config, node
        self._client: redis.Redis | None = None
        self._claim_from: bytes | None = None  # where to go on taking over; None: all of it is taken
        self.holding = False
        self.term = 0

    def hold(self) -> bool:
        """Renew the lease, or begin a term; False while another node has it."""
        return self._calling(self._hold)

    def read(self) -> list[Entry] | None:
        """The next entries, in order; none where nothing comes for a while, None once another node reads.

        What is not settled comes again in the next term, and after `start_over`.
        """
        return self._calling(self._read)

    def start_over(self) -> None:
        """Read everything that is not settled once more, before what is new."""
        self._claim_from = b"0-0"

    def settle(self, done: Sequence[Entry], refused: Sequence[Refusal]) -> None:
        """Take the entries out of the stream; refused ones go to the dead. All or nothing.

        Nothing once another node reads: it settles them itself.
        """
        self._calling(self._settle, done, refused)

    def release(self) -> None:
        """Let another node read at once."""
        if self.holding:
            self.holding = False
            self._calling(lambda client: client.eval(_RELEASE, 1, LEASE, self.node))

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
            self.start_over()  # what was read and not settled is pending
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
        try:
            client.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        except redis.ResponseError as error:
            if not str(error).startswith("BUSYGROUP"):
                raise
        self.start_over()

    def _if_held(self, client: redis.Redis, script: str, *arguments: Any) -> Any:
        """What the script returns; None once another node reads."""
        lease = (self.node, str(LEASE_MS))
        found = client.eval(script, 3, LEASE, STREAM, DEAD, *lease, GROUP, *arguments)
        if found is None:
            self._set_holding(False)
        return found

    def _read(self, client: redis.Redis) -> list[Entry] | None:
        try:
            while self._claim_from is not None:
                taken = self._if_held(client, _TAKE_OVER, COUNT, self._claim_from)
                if taken is None:
                    return None
                self._claim_from = taken[0] if taken[0] != b"0-0" else None
                if entries := _entries(taken[1]):
                    log.info("ingest_taken_over", entries=len(entries))
                    return entries
            return self._read_new(client)
        except redis.ResponseError as error:
            if "NOGROUP" not in str(error):  # Redis was emptied, or the stream deleted
                raise
            self._begin(client)
            return []

    def _read_new(self, client: redis.Redis) -> list[Entry] | None:
        found = self._if_held(client, _READ, COUNT)
        if found is None or found[0]:
            return found and _entries(found[0])
        # Only to be woken: this gives the entry to nobody.
        if client.xread({STREAM: found[1]}, count=1, block=BLOCK):
            found = self._if_held(client, _READ, COUNT)
        return found and _entries(found[0])

    def _settle(self, client: redis.Redis, done: Sequence[Entry], refused: Sequence[Refusal]) -> None:
        ids = [entry.id for entry in done] + [refusal.entry.id for refusal in refused]
        dead: list[str | bytes | int] = []
        for refusal in refused:
            fields = _dead(refusal)
            dead += [len(fields), *fields]
        self._if_held(client, _SETTLE, len(ids), *ids, DEAD_KEPT, *dead)


def _entries(raw: Sequence[tuple[bytes, list[bytes] | None] | None]) -> list[Entry]:
    found: list[Entry] = []
    for one in raw:
        if one is not None:  # Redis 6.2 tells of what was deleted in this way
            id, fields = one
            pairs = dict(zip((fields or [])[::2], (fields or [])[1::2], strict=True))
            found.append(Entry(id.decode(), pairs.get(b"m")))
    return found


def _dead(refusal: Refusal) -> list[str | bytes]:
    payload = refusal.entry.payload or b""
    field = ["field", refusal.field] if refusal.field else []
    why = ["id", refusal.entry.id, "code", refusal.code, "message", refusal.message]
    return ["m", payload[:DEAD_BYTES], *why, *field]
