"""Health checks and metrics: whether the process is alive, and whether it should get traffic. These routes need
no token, and cost little.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import trio
from msgspec import Struct
from quart import Blueprint, Response, request
from quart_schema import document_response, hide

from chatd.api.schemas import answer
from chatd.bus import Bus
from chatd.core.errors import Unavailable
from chatd.observe import metrics
from chatd.store import migrations
from chatd.store.read import lookups
from chatd.store.read.reader import Reader
from chatd.store.write.writer import Writer

REMEMBER = 1.0  # seconds for which a check of the database answers all requests
DATABASE_DEADLINE = 2.0  # seconds that a check waits for the database


class Alive(Struct, frozen=True):
    """The process answers."""

    status: str = "ok"


class Ready(Struct, frozen=True):
    """Whether chatd can store messages, and the state of each part."""

    status: str
    checks: dict[str, str]


class Health:
    def __init__(self, read: Reader, writer: Writer, bus: Bus, stopping: trio.Event, *, redis: bool) -> None:
        """`redis`: whether the bus uses Redis, and so can be down."""
        self._read, self._writer, self._bus = read, writer, bus
        self._stopping, self._redis = stopping, redis
        self._revision: str | None = None  # None while the database does not answer
        self._looked = -REMEMBER
        self._look = trio.Lock()
        self._head = migrations.head()

    async def report(self) -> tuple[int, dict[str, Any]]:
        """Return the HTTP status and the body of `/readyz`. Without Redis, posts still succeed and this node's
        clients are still served, so the status is `degraded` but 200.
        """
        revision = await self._find_revision()
        database = self._state_of_database(revision)
        checks = {"database": database}
        if revision is not None:
            # A newer schema works, because migrations only add. An older one means that the database was
            # replaced by an older copy.
            checks["migrations"] = "ok" if revision == self._head else f"at {revision}, not {self._head}"
        if self._redis:
            checks["redis"] = "ok" if self._bus.up else "down"
        if self._stopping.is_set():
            return 503, {"status": "stopping", "checks": checks}
        if database != "ok":
            return 503, {"status": "unavailable", "checks": checks}
        return 200, {"status": "ok" if self._bus.up else "degraded", "checks": checks}

    def _state_of_database(self, revision: str | None) -> str:
        """`read_only`: the last write failed because the database was locked, full or gone. The writer retries.

        `damaged`: since the start, a read of the SQLite file has found content that SQLite did not write.
        """
        if revision is None:
            return "down"
        if self._writer.damaged:
            return "damaged"
        return "read_only" if self._writer.failing else "ok"

    async def _find_revision(self) -> str | None:
        async with self._look:  # one check for all requests that wait
            if trio.current_time() - self._looked >= REMEMBER:
                found = None
                with trio.move_on_after(DATABASE_DEADLINE), suppress(Unavailable):
                    found = await self._read(lookups.revision)
                self._revision, self._looked = found, trio.current_time()
        return self._revision


def blueprint(health: Health) -> Blueprint:
    routes = Blueprint("health", __name__)

    @routes.get("/healthz")
    @document_response(Alive)
    async def alive() -> Response:
        """Whether the process answers. If it does not, restart it."""
        return answer(Alive())

    @routes.get("/readyz")
    @document_response(Ready)
    @document_response(Ready, 503)
    async def ready() -> Response:
        """Whether to send traffic here: `ok` and `degraded` (200), `unavailable` and `stopping` (503)."""
        status, body = await health.report()
        return answer(body, status)

    @routes.get("/metrics")
    @hide
    async def numbers() -> Response:
        text, content_type = metrics.exposition(", ".join(request.headers.getlist("Accept")))
        return Response(text, content_type=content_type)

    return routes
