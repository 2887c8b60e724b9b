"""One worker process, as its parent knows it."""

from __future__ import annotations

import signal

import trio

START_PATIENCE = 120.0  # seconds until a worker must be ready


class Worker:
    """A worker's process, its last status, and the deadline for its next report."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: trio.Process | None = None
        self.ready = False
        self.status = "starting"
        self.missed_reload = False
        self.next = False  # no worker serves, and this one is about to be started
        self.patience = trio.CancelScope()

    def begin(self, process: trio.Process) -> None:
        self.process = process
        self.missed_reload = False
        self.ready, self.status = False, "starting"
        self.patience = trio.CancelScope(deadline=trio.current_time() + START_PATIENCE)

    def ended(self) -> None:
        self.process = None
        self.ready, self.status = False, "ended"

    def give(self, seconds: float) -> None:
        """Move the deadline to `seconds` from now, but never to an earlier time: a worker that has announced a
        long stop keeps that time when it pings.
        """
        self.patience.deadline = max(self.patience.deadline, trio.current_time() + seconds)

    def reload(self) -> None:
        """Send SIGHUP now, or when the worker is ready. Before, the signal would kill it, and it may already
        have read the old configuration.
        """
        self.missed_reload = not self.ready
        if self.ready:
            self.signal(signal.SIGHUP)

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
