"""Runs Hypercorn in the daemon's nursery: its settings, how it starts, and how it stops with the daemon."""

from __future__ import annotations

import logging
import socket
from functools import partial

import hypercorn.trio
import hypercorn.trio.run
import trio

from chatd.api import connection
from chatd.api.access import is_token
from chatd.api.app import create_app
from chatd.api.health import Health
from chatd.api.leave import Leave
from chatd.api.strangers import Strangers
from chatd.chat.chat import Chat
from chatd.config.settings import Settings
from chatd.net.descriptors import raise_descriptor_limit, unknown_slots
from chatd.net.gate import BACKLOG, somebody_waits
from chatd.net.lobby import Lobby
from chatd.observe.sampler import Sampler

UNLIMITED = 1e9  # seconds; the daemon has its own deadlines for a stop
SETTLE = 0.1  # seconds in which Hypercorn stops accepting
LAST_ACCEPTS = 1.0  # seconds to accept the connections that the kernel had already queued at the stop

hypercorn.trio.run.TCPServer = connection.Connection  # type: ignore  # Hypercorn offers no other way in


async def serve(
    settings: Settings,
    chat: Chat,
    healthy: Health,
    sampler: Sampler,
    node: str,
    listening: socket.socket,
    leave: Leave,
    stop: trio.Event,
    *,
    task_status: trio.TaskStatus[trio.Event] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `stop`, then finish the requests in progress. `task_status.started` gets an event that is set
    when they are finished. The caller limits the time for this.
    """
    finished = trio.Event()
    app = create_app(settings, chat, healthy, sampler, node)

    accepted = trio.Event()

    async def end() -> None:
        await stop.wait()
        leave.at_once()

    async def all_are_in() -> None:
        """Wait until no more connections shall be accepted, and those queued in the kernel were accepted."""
        await leave.full.wait()
        with trio.move_on_after(LAST_ACCEPTS):
            while somebody_waits(listening):
                await trio.lowlevel.checkpoint()
        accepted.set()

    async def close() -> None:
        """Close the listening socket early: Hypercorn would keep it open as long as it has connections."""
        await accepted.wait()
        await trio.sleep(SETTLE)
        listening.close()

    try:
        async with trio.open_nursery() as beside:
            async with trio.open_nursery() as nursery:
                run = partial(hypercorn.trio.serve, app, _settings(settings, listening, leave))
                await nursery.start(partial(run, shutdown_trigger=all_are_in))
                beside.start_soon(end)
                beside.start_soon(close)
                task_status.started(finished)
            beside.cancel_scope.cancel()
    finally:
        listening.close()
        finished.set()


def _settings(ours: Settings, listening: socket.socket, leave: Leave) -> connection.HypercornConfig:
    settings = connection.HypercornConfig()
    settings.leave = leave
    settings.lobby = Lobby("api", unknown_slots(raise_descriptor_limit()))
    settings.strangers = Strangers()
    settings.is_token = lambda tokens: is_token(ours.now.api, tokens)
    settings.listening = listening
    settings.backlog = BACKLOG  # Hypercorn calls listen() again, with 100 unless told otherwise
    settings.graceful_timeout = UNLIMITED
    settings.include_server_header = False
    settings.accesslog = None
    settings.errorlog = logging.getLogger("chatd.http")
    return settings
