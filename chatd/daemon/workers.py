"""The parent of several worker processes that share the listening sockets. It is their service manager.

It opens the sockets, starts `server.workers` processes of `chatd serve` with them, receives READY=1 and
WATCHDOG=1 from each, restarts workers that have ended, and passes signals on. To each other the workers are
nodes, as on different hosts.
"""

from __future__ import annotations

import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import structlog
import trio
from prometheus_client.multiprocess import mark_process_dead

from chatd.config import Config
from chatd.core.backoff import Backoff
from chatd.core.errors import ConfigError, OperatorError
from chatd.daemon import systemd
from chatd.daemon.listen import open_sockets
from chatd.daemon.worker import Worker

WATCHDOG = 30.0  # seconds that a worker's loop may block, unless systemd sets another time for this process
ABORT_GRACE = 5.0  # seconds that a worker has to write its traceback after SIGABRT
STOP_PATIENCE = 35.0  # seconds for a stop, beyond the drain window: a worker needs 25 at most, or asks for more
STOP_GRACE = 5.0  # seconds in addition to the time that a worker asks for
BACKOFF_FIRST, BACKOFF_MOST = 0.1, 10.0  # seconds until a restart, doubled each time
ALONE_MOST = 1.0  # seconds until a restart, at most, while no worker serves or starts
LATE = 1.0  # seconds after a deadline; if it is noticed later than this, this process itself did not run
LONG_LIFE = 30.0  # seconds after which the backoff begins from the start
LONGEST_DIRECTORY = 90  # bytes: a socket's path has 107 at most (unix(7)), including the name in the directory
DATAGRAM = 4096  # bytes; a worker's messages have a few dozen

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
LAUNCHER = Path(__file__).with_name("launch.py")

log = structlog.get_logger()


def is_worker() -> bool:
    """Whether this process is one of several that a parent started."""
    return "CHATD_WORKER_NUMBER" in os.environ


def share(config: Config) -> Config:
    """Return the configuration with a worker's share of the limits that are for all workers together."""
    limits, workers = config.limits, int(os.environ.get("CHATD_WORKERS", "1"))
    limits = msgspec.structs.replace(
        limits,
        connections=_share(limits.connections, workers),
        handshakes_per_second=_share(limits.handshakes_per_second, workers),
    )
    return msgspec.structs.replace(config, limits=limits)


async def run(
    config: Config, read_again: Callable[[], Config], *, on_ready: Callable[[], None] = lambda: None
) -> int:
    """Serve with `server.workers` processes until SIGTERM or SIGINT, and return the exit code.

    Raises OperatorError if it cannot start any.
    """
    api_socket, hub_sockets = open_sockets(config)
    sockets = [("api", api_socket), *(("hub", one) for one in hub_sockets)]
    with _directory() as directory:
        return await Workers(config, sockets, directory, read_again, on_ready).run()


class Workers:
    """The worker processes: starts, restarts and stops them."""

    def __init__(
        self,
        config: Config,
        sockets: list[tuple[str, socket.socket]],
        directory: Path,
        read_again: Callable[[], Config],
        on_ready: Callable[[], None],
    ) -> None:
        self._config, self._sockets, self._directory = config, sockets, directory
        self._read_again, self._on_ready = read_again, on_ready
        self._workers = [Worker(number) for number in range(1, config.server.workers + 1)]
        period = systemd.watchdog_period()
        self._watchdog = WATCHDOG if period is None else 2 * period
        self._complete = False  # all workers were ready once, so the configuration works
        self._alone = BACKOFF_FIRST  # seconds until the next attempt while no worker serves
        self._news = trio.Event()  # set, and replaced by a new one, when a worker has ended or all shall stop
        self._stop = trio.Event()
        self._patience = trio.CancelScope()  # its deadline is set when all workers shall stop
        self._exit_code = 0

    async def run(self) -> int:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._watch_signals)
            nursery.start_soon(self._report_to_systemd)
            with self._patience:
                async with trio.open_nursery() as workers:
                    for worker in self._workers:
                        workers.start_soon(self._keep, worker)
            if self._patience.cancelled_caught:
                log.error("stop_took_too_long")
                self._exit_code = self._exit_code or 1
            nursery.cancel_scope.cancel()
        log.info("workers_stopped")
        return self._exit_code

    # One worker.

    async def _keep(self, worker: Worker) -> None:
        """Start a worker, and start it again each time it ends."""
        backoff = Backoff(BACKOFF_FIRST, BACKOFF_MOST)
        while not self._stop.is_set():
            began = trio.current_time()
            was_ready, code = await self._live(worker)
            if self._stop.is_set():
                if was_ready and code != 0:
                    self._exit_code = self._exit_code or 1
                return
            if not self._complete and not was_ready and code > 0:
                # It cannot start, so the others cannot either. It has already printed the reason.
                self._exit_code = code
                self._stop_all(signal.SIGTERM)
                return
            if trio.current_time() - began >= LONG_LIFE:
                backoff.reset()
            again_in = backoff.next()
            log.error("worker_ended", worker=worker.number, code=code, again_in=round(again_in, 2))
            await self._back_off(worker, again_in)

    async def _back_off(self, worker: Worker, seconds: float) -> None:
        """Wait before the next start. While no worker serves, one of those that wait is started sooner."""
        until = trio.current_time() + seconds
        try:
            while not self._stop.is_set() and trio.current_time() < until:
                if not worker.next and not any(one.process or one.next for one in self._workers):
                    worker.next = True
                    until = min(until, trio.current_time() + self._alone)
                    self._alone = min(2 * self._alone, ALONE_MOST)
                with trio.move_on_at(until):
                    await self._news.wait()
        finally:
            worker.next = False

    def _tell(self) -> None:
        """Wake the waiting workers, so that they check again whether any worker serves."""
        self._news.set()
        self._news = trio.Event()

    async def _live(self, worker: Worker) -> tuple[bool, int]:
        """Run one process. Returns whether it was ever ready, and its exit code (negative for a signal)."""
        path = self._directory / f"worker-{worker.number}"
        try:
            with _notify_socket(path) as notified:
                process = await self._start(worker, path)
                return await self._accompany(worker, process, notified)
        except OSError as error:  # no memory, descriptor or pid is free: a later attempt may succeed
            log.error("worker_not_started", worker=worker.number, error=str(error))
            return False, -1

    async def _accompany(
        self, worker: Worker, process: trio.Process, notified: trio.socket.SocketType
    ) -> tuple[bool, int]:
        worker.begin(process)
        if self._stop.is_set():  # it was set while the process started
            worker.signal(signal.SIGTERM)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._hear, worker, notified)
                await self._watch(worker, process)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                process.kill()  # does nothing if the process has ended
                await process.wait()
            was_ready = worker.ready
            worker.ended()
            self._tell()
            self._forget_numbers(worker)
        assert process.returncode is not None
        return was_ready, process.returncode

    def _forget_numbers(self, worker: Worker) -> None:
        """Remove the gauges of an ended worker. If their files are gone already, continue."""
        try:
            mark_process_dead(worker.number, str(self._directory))  # type: ignore[no-untyped-call]
        except OSError as error:
            log.warning("metrics_not_removed", worker=worker.number, error=str(error))

    async def _watch(self, worker: Worker, process: trio.Process) -> None:
        """Wait until the process has ended. Abort it if it misses the deadline for its next report."""
        while process.returncode is None:
            with worker.patience:
                await process.wait()
            now = trio.current_time()
            if process.returncode is None and now - worker.patience.deadline < LATE:
                await self._abort(worker, process)
                return
            # This process did not run either (the machine was paused, say), so the worker could not ping.
            worker.patience = trio.CancelScope(deadline=now + self._watchdog)

    async def _start(self, worker: Worker, notify: Path) -> trio.Process:
        """Start this process's own command line, with an environment that makes it a worker."""
        descriptors = [str(one.fileno()) for _, one in self._sockets]
        return await trio.lowlevel.open_process(
            [
                *(sys.executable, "-I", "-S", str(LAUNCHER), ",".join(descriptors)),
                *(sys.executable, *sys.orig_argv[1:]),
            ],
            env=self._environ(worker, notify),
            pass_fds=[one.fileno() for _, one in self._sockets],
            stdin=subprocess.DEVNULL,
        )

    def _environ(self, worker: Worker, notify: Path) -> dict[str, str]:
        ours = {
            "CHATD_SERVER__WORKERS": "1",
            "CHATD_WORKERS": str(len(self._workers)),
            "CHATD_WORKER_NUMBER": str(worker.number),
            "CHATD_WORKER_PARENT": str(os.getpid()),
            "LISTEN_FDS": str(len(self._sockets)),
            "LISTEN_FDNAMES": ":".join(name for name, _ in self._sockets),
            "NOTIFY_SOCKET": str(notify),
            "WATCHDOG_USEC": str(round(self._watchdog * 1e6)),
            "PROMETHEUS_MULTIPROC_DIR": str(self._directory),
        }
        # A variable NAME_FILE would take precedence over NAME.
        theirs = {f"{name}_FILE" for name in ours} | {"WATCHDOG_PID"}
        return {name: value for name, value in os.environ.items() if name not in theirs} | ours

    async def _abort(self, worker: Worker, process: trio.Process) -> None:
        """A worker hangs: SIGABRT makes it write its traceback and end."""
        log.error("worker_hangs", worker=worker.number, ready=worker.ready)
        process.send_signal(signal.SIGABRT)
        process.send_signal(signal.SIGCONT)  # a process stopped by SIGSTOP handles the other signal only then
        with trio.move_on_after(ABORT_GRACE):
            await process.wait()

    # The workers' reports.

    async def _hear(self, worker: Worker, notified: trio.socket.SocketType) -> None:
        while True:
            text = (await notified.recv(DATAGRAM)).decode(errors="replace")
            for line in text.splitlines():
                key, _, value = line.partition("=")
                self._heard(worker, key, value)

    def _heard(self, worker: Worker, key: str, value: str) -> None:
        if key == "READY":
            worker.ready = True
            self._alone = BACKOFF_FIRST
            if worker.missed_reload:
                worker.reload()
            worker.patience.deadline = trio.current_time() + self._watchdog
            self._welcome()
        elif key == "WATCHDOG":
            worker.give(self._watchdog)
        elif key == "EXTEND_TIMEOUT_USEC" and value.isdecimal():
            worker.give(int(value) / 1e6 + STOP_GRACE)
            if self._stop.is_set():
                self._give(int(value) / 1e6 + STOP_GRACE)
        elif key == "STATUS":
            worker.status = value
            systemd.status(self._status())

    def _welcome(self) -> None:
        """Report READY=1 when all workers are ready for the first time."""
        if self._complete or self._stop.is_set() or not all(worker.ready for worker in self._workers):
            return
        self._complete = True
        log.info("workers_ready", workers=len(self._workers))
        systemd.ready(self._status())
        self._on_ready()

    def _status(self) -> str:
        """Return a status line: how many workers are ready, and the sum of their connections."""
        ready = sum(worker.ready for worker in self._workers)
        connections = sum(
            int(found[1]) for one in self._workers if (found := re.search(r"(\d+) connections", one.status))
        )
        doing = "draining" if self._stop.is_set() else "serving"
        return f"{doing} {connections} connections, {ready} of {len(self._workers)} workers are ready"

    # All workers together.

    async def _watch_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Pass each signal on. A second SIGTERM or SIGINT reaches the workers too, which end at once then."""
        with trio.open_signal_receiver(*PASSED_ON) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGHUP:
                    self._reload()
                else:
                    self._stop_all(number)

    def _reload(self) -> None:
        """Check the configuration and report the result to systemd. The workers read it themselves."""
        systemd.reloading()
        status = self._status()
        try:
            self._read_again()
        except Exception as error:  # no content of a file may end a daemon that serves
            mistakes = list(error.mistakes) if isinstance(error, ConfigError) else [repr(error)[:500]]
            log.error("reload_refused", mistakes=mistakes)
            status = f"the configuration was not reloaded: it has mistakes; {status}"
        for worker in self._workers:  # also a bad configuration: each worker counts the refusal in its metrics
            worker.reload()
        systemd.ready(status)

    def _stop_all(self, number: int) -> None:
        if not self._stop.is_set():
            self._stop.set()
            self._tell()
            log.info("workers_stopping")
            # While this process keeps them open, the kernel accepts connections that no worker serves.
            for _, one in self._sockets:
                one.close()
            self._give(self._config.server.drain_window + STOP_PATIENCE)
        for worker in self._workers:
            worker.signal(number)

    def _give(self, seconds: float) -> None:
        """Move the deadline of the stop to `seconds` from now, if that is later."""
        until = trio.current_time() + seconds
        if self._patience.deadline == math.inf or until > self._patience.deadline:
            self._patience.deadline = until
            systemd.stopping(self._status(), seconds)

    async def _report_to_systemd(self) -> None:
        """Ping systemd's watchdog for this process. This process itself watches the workers."""
        period = systemd.watchdog_period()
        while period is not None:
            systemd.notify("WATCHDOG=1")
            await trio.sleep(period)


@contextmanager
def _directory() -> Iterator[Path]:
    """Create a private directory for the notify sockets and the metrics. It is in systemd's runtime directory,
    if there is one, because clean-up jobs delete old files in /tmp.
    """
    try:
        made = tempfile.TemporaryDirectory(prefix="chatd-", dir=os.environ.get("RUNTIME_DIRECTORY"))
    except OSError as error:
        raise OperatorError(f"server.workers: no directory for temporary files: {error}.") from error
    with made as name:
        if len(name) > LONGEST_DIRECTORY:
            raise OperatorError(f"server.workers: {name} is too long for a socket's path; set TMPDIR.")
        yield Path(name)


@contextmanager
def _notify_socket(path: Path) -> Iterator[trio.socket.SocketType]:
    """Open the socket to which one process reports. Each start gets a new one, so that late messages of the
    previous process are not mistaken for the new one's.
    """
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as bound:
        bound.bind(str(path))
        with trio.socket.from_stdlib_socket(bound) as notified:
            yield notified


def _share(limit: int, workers: int) -> int:
    return max(1, limit // workers) if limit else 0  # 0 is no limit
