"""One of the processes that `workers` keeps, as their parent sees it."""

from __future__ import annotations

import signal

import trio

START_PATIENCE = 120.0  # seconds until a worker must be ready


class Worker:
    """One of the processes: what it said last, and until when it must say something again."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.process: trio.Process | None = None
        self.ready = False
        self.status = "starting"
        self.missed_reload = False
        self.next = False  # nobody serves, and this one is about to be started
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
        """So much more time. A stop that takes long was announced: no later ping shortens it."""
        self.patience.deadline = max(self.patience.deadline, trio.current_time() + seconds)

    def reload(self) -> None:
        """Now, or once it is ready: it may have read the old configuration, and would die of the signal."""
        self.missed_reload = not self.ready
        if self.ready:
            self.signal(signal.SIGHUP)

    def signal(self, number: int) -> None:
        if self.process is not None:
            self.process.send_signal(number)
