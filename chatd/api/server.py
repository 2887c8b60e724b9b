"""Hypercorn inside our nursery: its settings, and how it starts and ends with the daemon."""

from __future__ import annotations

import logging
import socket
from functools import partial

import hypercorn.trio
import hypercorn.trio.run
import structlog
import trio
from hypercorn.config import Config as HypercornConfig
from hypercorn.trio.tcp_server import TCPServer

from chatd import metrics
from chatd.api.app import create_app
from chatd.api.health import Health
from chatd.chat import Chat
from chatd.listen import BACKLOG
from chatd.settings import Settings
from chatd.vitals import Vitals

KEEP_ALIVE = 75.0  # seconds; longer than a pool of a backend holds idle connections
GRACE = 3.0  # seconds for requests in progress when the daemon stops

log = structlog.get_logger()


class Peer(TCPServer):
    """One HTTP connection, which harms nobody else and ends with its peer.

    Hypercorn's own lets errors through that a peer can bring about (a malformed HTTP/2 upgrade, bytes that are
    no text), up into our nursery. And it waits out the keep-alive timer after the peer has hung up: a backend
    that connects anew for each request would soon hold all descriptors.
    """

    async def run(self) -> None:
        try:
            await super().run()
        except* Exception as group:
            metrics.HTTP_FAILED.inc()
            log.debug("http_connection_failed", error=repr(group.exceptions[0]))

    async def _read_data(self) -> None:
        await super()._read_data()
        await self.idle_task.stop()


hypercorn.trio.run.TCPServer = Peer  # type: ignore[attr-defined]  # Hypercorn offers no other way in


async def serve(
    settings: Settings,
    chat: Chat,
    healthy: Health,
    vitals: Vitals,
    node: str,
    listening: socket.socket,
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop`, then finish what is in progress; the event given to `started` says that it is."""
    finished = trio.Event()
    app = create_app(settings, chat, healthy, vitals, node)
    try:
        async with trio.open_nursery() as nursery:
            run = partial(hypercorn.trio.serve, app, _settings(listening), shutdown_trigger=stop.wait)
            await nursery.start(run)
            task_status.started(finished)
    finally:
        finished.set()


def _settings(listening: socket.socket) -> HypercornConfig:
    settings = HypercornConfig()
    settings.bind = [f"fd://{listening.detach()}"]
    settings.backlog = BACKLOG  # Hypercorn calls listen() again, with 100 unless told otherwise
    settings.graceful_timeout = GRACE
    settings.keep_alive_timeout = KEEP_ALIVE
    settings.keep_alive_max_requests = 1_000_000  # backends are few and long-lived
    settings.read_timeout = None
    settings.include_server_header = False
    settings.accesslog = None
    settings.errorlog = logging.getLogger("chatd.http")
    return settings
