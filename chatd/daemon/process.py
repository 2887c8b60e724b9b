"""What this process owes others: an end to who signals it, a sign of life to its manager and its parent."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Awaitable, Callable

import structlog
import trio
from structlog.typing import FilteringBoundLogger

from chatd.daemon import systemd

SAME_SIGNAL = 0.5  # seconds; shells and wrappers signal a process and then its group
STATUS_PERIOD = 10.0  # seconds between two lines for `systemctl status`
PARENT_PERIOD = 1.0  # seconds between a worker's looks whether its parent is there

log: FilteringBoundLogger = structlog.get_logger()


async def watch_signals(
    stop: trio.Event,
    reload: Callable[[], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The first signal asks to stop, the second ends the process at once. SIGHUP reloads the configuration."""
    with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT, signal.SIGHUP) as signals:
        task_status.started()
        asked_at = math.inf
        async for number in signals:
            if number == signal.SIGHUP:
                if not stop.is_set():
                    reload()
                continue
            if trio.current_time() - asked_at > SAME_SIGNAL:
                log.warning("ended_at_once", signal=signal.Signals(number).name)
                os._exit(1)
            asked_at = min(asked_at, trio.current_time())
            stop.set()


def end_anyhow_after(seconds: float) -> None:
    """A thread that is stuck in a driver cannot be cancelled, and would keep the nursery open for ever."""

    def end() -> None:
        log.error("stop_took_too_long", seconds=seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


async def follow_parent(stop: trio.Event, let_go: Callable[[], None]) -> None:
    """A worker whose parent was killed ends as with SIGTERM: nobody is left to end it, or to start it again.
    But at first it lets go of its listening sockets, for the next parent needs the addresses at once.

    No signal is sent for it (PR_SET_PDEATHSIG): that one comes when the *thread* that started a process ends,
    and trio starts processes in threads.
    """
    parent = os.environ.get("CHATD_WORKER_PARENT")
    if parent is None:
        return
    await _end_of(int(parent))
    log.error("parent_gone")
    let_go()
    stop.set()


async def _end_of(parent: int) -> None:
    try:
        descriptor = os.pidfd_open(parent)
    except ProcessLookupError:
        return
    except OSError:  # there is no descriptor left, or the system has none of these
        while os.getppid() == parent:  # noqa: ASYNC110  # nobody sets an event any more
            await trio.sleep(PARENT_PERIOD)
        return
    try:
        if os.getppid() == parent:  # else it is another process that has its number now
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


async def ping_watchdog() -> None:
    """It proves that the loop turns, and nothing else: no restart cures a database."""
    period = systemd.watchdog_period()
    while period is not None:
        systemd.notify("WATCHDOG=1")
        await trio.sleep(period)


async def tell_status(status: Callable[[], Awaitable[str]]) -> None:
    """A line for `systemctl status`, as long as there is somebody to tell."""
    while systemd.manages():
        systemd.status(await status())
        await trio.sleep(STATUS_PERIOD)
