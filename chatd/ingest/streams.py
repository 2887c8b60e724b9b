"""Finds the streams from which chatd takes messages: listed names, and names that match a listed pattern.

Laravel puts a prefix before the name of a stream, made of the application's name. chatd logs a hint about
streams whose names end in the right way and that are not listed.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

import redis
import structlog
from redis.exceptions import NoPermissionError

from chatd.bus import kicks
from chatd.bus.client import STREAM as CHANGES
from chatd.bus.unheard import Unheard
from chatd.core.names import Names
from chatd.observe.logs import Recurring

STREAM, DEAD = "chat.ingest", "chat.ingest.dead"
PREFIXED = f"?*{STREAM}"
NEVER = {DEAD, CHANGES, kicks.STREAM}  # these are chatd's own

LOOK_EVERY = 20.0  # seconds between two looks for streams
SCANS, SCANNED = 50, 1000  # of one look: a Redis with more keys takes several
MOST_FOUND = 100  # streams found by patterns, at most

log = structlog.get_logger()


class Streams:
    def __init__(self, listed: Sequence[str]) -> None:
        self._names = Names(name for name in listed if name not in NEVER)
        self._found: list[str] = []
        self._out: set[str] = set()  # listed or found, but not readable
        self._unheard = Unheard("ingest_streams", self._names)
        self._cursors = dict.fromkeys({*self._names.patterns, PREFIXED}, 0)
        self._looked_at = -LOOK_EVERY
        self._full = Recurring("ingest_streams_full")
        self._turn = 0

    def __iter__(self) -> Iterator[str]:
        return (name for name in (*self._names.exact, *self._found) if name not in self._out)

    def __contains__(self, name: str) -> bool:
        return name in list(self)

    def by_turns(self) -> list[str]:
        """Return all streams, each time beginning with the next one, so that a busy stream starves no other."""
        names = list(self)
        self._turn += 1
        first = self._turn % max(len(names), 1)
        return names[first:] + names[:first]

    def look(self, client: redis.Redis) -> list[str]:
        """Search for streams at most every LOOK_EVERY seconds. Returns the new ones."""
        if time.monotonic() - self._looked_at < LOOK_EVERY:
            return []
        self._looked_at = time.monotonic()
        new: list[str] = []
        try:
            for pattern in self._cursors:
                new += [name for name in self._scan(client, pattern) if self._takes(name)]
        except NoPermissionError as error:
            if self._names.patterns:
                log.warning("ingest_patterns_refused", error=str(error))
            self._looked_at = float("inf")
        return new

    def leave_out(self, stream: str, error: redis.ResponseError) -> bool:
        """Skip a stream from now on that this user may not read, or that is another type of key. Returns False
        for any other error.
        """
        harmless = isinstance(error, NoPermissionError) or str(error).startswith("WRONGTYPE")
        if stream == STREAM or not harmless:
            return False
        self._out.add(stream)
        log.warning("ingest_stream_refused", stream=stream, error=str(error))
        return True

    def _scan(self, client: redis.Redis, pattern: str) -> Iterator[str]:
        for _ in range(SCANS):
            cursor = self._cursors[pattern]
            reply: Any = client.scan(cursor, match=pattern, count=SCANNED, _type="stream")
            self._cursors[pattern], found = reply
            yield from (name.decode(errors="replace") for name in found)
            if not self._cursors[pattern]:
                return

    def _takes(self, name: str) -> bool:
        """Add a stream if its name matches a pattern. Returns whether it is new."""
        entry = self._names.entry_for(name)
        if entry is None:
            self._unheard.note(name)
            return False
        if entry == name or name in NEVER or name in self._found:
            return False
        if len(self._found) == MOST_FOUND:
            self._full.warn(
                stream=name, most=MOST_FOUND, advice="make the patterns of redis.ingest_streams narrower"
            )
            return False
        self._found.append(name)
        return True
