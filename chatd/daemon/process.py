"""How this process deals with its surroundings: it stops on a signal or when its parent is gone, pings the
watchdog of its service manager, and reports its status there.
"""

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

# Seconds in which a second signal counts as the first: shells and wrappers signal a process and then its group.
SAME_SIGNAL = 0.5
STATUS_PERIOD = 10.0  # seconds between two status lines for `systemctl status`
PARENT_PERIOD = 1.0  # seconds between two checks whether a worker's parent still runs

log: FilteringBoundLogger = structlog.get_logger()


async def watch_signals(
    stop: trio.Event,
    reload: Callable[[], None],
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """The first SIGTERM or SIGINT asks the daemon to stop, the second ends the process at once. SIGHUP reloads
    the configuration.
    """
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
    """End the process in `seconds`, even if it has not stopped by then: a thread that is stuck in a database
    driver cannot be cancelled, and would keep the nursery open for ever.
    """

    def end() -> None:
        log.error("stop_took_too_long", seconds=seconds)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()


async def follow_parent(stop: trio.Event, let_go: Callable[[], None]) -> None:
    """Stop this worker when its parent has ended, because no process is left that could stop or restart it.
    Close its listening sockets first, because the next parent needs their addresses at once.

    PR_SET_PDEATHSIG is not used: it sends its signal when the *thread* that started the process ends, and trio
    starts processes in threads.
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
    except OSError:  # no descriptor is free, or the kernel has no pidfd_open
        while os.getppid() == parent:  # noqa: ASYNC110  # there is no event to wait for
            await trio.sleep(PARENT_PERIOD)
        return
    try:
        if os.getppid() == parent:  # else another process has this pid now
            await trio.lowlevel.wait_readable(descriptor)
    finally:
        os.close(descriptor)


async def ping_watchdog() -> None:
    """Ping systemd's watchdog while the event loop runs. The health checks play no part in this: a restart does
    not help if the database is down.
    """
    period = systemd.watchdog_period()
    while period is not None:
        systemd.notify("WATCHDOG=1")
        await trio.sleep(period)


async def tell_status(status: Callable[[], Awaitable[str]]) -> None:
    """Send a status line for `systemctl status` regularly, if there is a service manager."""
    while systemd.manages():
        systemd.status(await status())
        await trio.sleep(STATUS_PERIOD)
