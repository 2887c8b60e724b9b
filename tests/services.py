"""Debian's Redis and PostgreSQL, started for the tests on a loopback port and in a directory of their own.

Synchronous, for plain fixtures. They can be stopped, killed, frozen and started again on the same data.
"""

from __future__ import annotations

import itertools
import os
import random
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import IO, ClassVar, Self

import psycopg

# Seconds. A start takes under one on an idle machine; a busy one may take long.
START_DEADLINE = 30.0
# Seconds between two looks at a server that starts or ends.
POLL = 0.02
# Seconds for an orderly stop, then SIGKILL.
STOP_DEADLINE = 15.0
# The last lines of a log that belong into an error message.
LOG_LINES = 20

# `setpriv --pdeathsig` ends a server with the tests, but what it watches is the *thread* that started the
# server: so all are started by this one, which lives as long as the process.
_launcher = ThreadPoolExecutor(1, "services")


class ServiceError(RuntimeError):
    """A server is not installed, did not start, or did not end; the message says what to do."""


class Service(ABC):
    """A server process: what Redis and PostgreSQL have in common.

    A context manager starts it and closes it. Its data lie in `directory`, where its log is, too.
    """

    name: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self.directory = directory
        self.port = free_port()
        self.log = directory / f"{self.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._paused: list[int] = []

    @property
    @abstractmethod
    def url(self) -> str:
        """What goes into the configuration of chatd."""

    @abstractmethod
    def command(self) -> list[str]:
        """The server's command line, in the foreground."""

    @abstractmethod
    def answers(self) -> bool:
        """Whether it takes commands."""

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start it, on the same port and data as before; return when it takes commands."""
        if self.running:
            raise ServiceError(f"{self.name} runs already.")
        with self.log.open("ab") as log:
            self._process = _launcher.submit(_spawn, self.command(), self.directory, log).result()
        deadline = time.monotonic() + START_DEADLINE
        while not self.answers():
            if not self.running:
                raise ServiceError(f"{self.name} ended at its start.\n{self._log_tail()}")
            if time.monotonic() > deadline:
                self.kill()
                raise ServiceError(f"{self.name} did not answer in {START_DEADLINE:.0f} s.\n{self._log_tail()}")
            time.sleep(POLL)

    def stop(self) -> None:
        """End it in an orderly way: it writes what it has, and closes its connections."""
        if self._process is None:
            return
        self.resume()
        self._process.send_signal(self.stop_signal)
        try:
            self._process.wait(STOP_DEADLINE)
        except subprocess.TimeoutExpired:
            self.kill()
            raise ServiceError(
                f"{self.name} did not stop in {STOP_DEADLINE:.0f} s.\n{self._log_tail()}"
            ) from None
        self._process = None

    def kill(self) -> None:
        """SIGKILL to it and its children at once; return when they are gone."""
        if self._process is None or not self.running:
            return
        family = self._freeze()  # a frozen parent cannot start another child while we kill them
        for pid in family:
            _signal(pid, signal.SIGKILL)
        _wait_until(lambda: all(_state(pid) == "Z" for pid in family), f"{self.name} lives on after SIGKILL.")
        self._process.wait()
        self._process = None
        self._paused = []

    def pause(self) -> None:
        """SIGSTOP to it and its children: connections stay open, and nothing answers."""
        self._paused = self._freeze()

    def resume(self) -> None:
        """SIGCONT after `pause()`."""
        for pid in self._paused:
            _signal(pid, signal.SIGCONT)
        self._paused = []

    def close(self) -> None:
        """Stop it, if it runs."""
        self.stop()

    def _freeze(self) -> list[int]:
        if self._process is None or not self.running:
            raise ServiceError(f"{self.name} does not run.")
        family = [self._process.pid]
        for pid in family:  # grows while we go: a parent stands still before its children are listed
            _stop(pid)
            family += _children(pid)
        return family

    def _log_tail(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        return "\n".join([f"The end of {self.log}:", *lines[-LOG_LINES:]])

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class RedisServer(Service):
    """redis-server. Its data survive a kill, unless `durable=False`: then it is empty after each start."""

    name = "redis-server"

    def __init__(self, directory: Path, *, durable: bool = True) -> None:
        super().__init__(directory)
        self.durable = durable
        self._binary = _binary("redis-server", [Path("/usr/bin/redis-server")], package="redis-server")

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def command(self) -> list[str]:
        # appendfsync no: each write reaches the kernel before its answer, and no test cuts the power.
        options = {
            "bind": "127.0.0.1",
            "port": str(self.port),
            "dir": str(self.directory),
            "save": "",
            "appendonly": "yes" if self.durable else "no",
            "appendfsync": "no",
            "daemonize": "no",
        }
        arguments = [part for key, value in options.items() for part in (f"--{key}", value)]
        return ["setpriv", "--pdeathsig", "KILL", str(self._binary), *arguments]

    def answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(100).startswith(b"+PONG")
        except OSError:
            return False


class PostgresServer(Service):
    """PostgreSQL with a superuser `chatd` and a database `chatd`; nobody needs a password.

    A kill loses nothing, for the kernel lives on; `fsync=True` is for measuring: commits wait for the disk.
    As root it runs as the user `postgres`, with its data in a directory of /tmp, which that user can reach.
    """

    name = "postgres"
    # "Fast": it ends the sessions itself instead of waiting for them.
    stop_signal = signal.SIGINT

    def __init__(self, directory: Path, *, fsync: bool = False) -> None:
        super().__init__(directory)
        self.fsync = fsync
        newest_first = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=_version, reverse=True)
        self._binary = _binary("postgres", [path / "postgres" for path in newest_first], package="postgresql")
        self._numbers = itertools.count(1)
        self._data: Path | None = None

    @property
    def url(self) -> str:
        return self._url("chatd")

    def command(self) -> list[str]:
        settings = {
            "listen_addresses": "127.0.0.1",
            "port": str(self.port),
            "unix_socket_directories": "",
            "fsync": "on" if self.fsync else "off",
            "full_page_writes": "on" if self.fsync else "off",
            "max_connections": "200",
            "shared_buffers": "64MB",
        }
        options = [part for key, value in settings.items() for part in ("-c", f"{key}={value}")]
        return self.as_user([str(self._binary), "-D", str(self._data), *options])

    def start(self) -> None:
        first = self._data is None
        if first:
            self._data = self._make_data()
        super().start()
        if first:
            self._fill()

    def answers(self) -> bool:
        try:
            with psycopg.connect(self._url("postgres"), connect_timeout=5):
                return True
        except psycopg.OperationalError:
            return False

    def crash(self) -> None:
        """As `pg_ctl stop -m immediate`: all sessions end at once, and the next start recovers from the log."""
        assert self._process is not None
        self._process.send_signal(signal.SIGQUIT)
        self._process.wait(STOP_DEADLINE)
        self._process = None

    def create_database(self) -> str:
        """A fresh, empty database; its URL."""
        name = f"test_{next(self._numbers)}"
        self._execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def close(self) -> None:
        """Stop it, if it runs, and remove its data."""
        super().close()
        if self._data is not None:
            shutil.rmtree(self._data.parent)
            self._data = None

    def _url(self, database: str) -> str:
        return f"postgresql://chatd@127.0.0.1:{self.port}/{database}"

    def _execute(self, statement: str) -> None:
        with psycopg.connect(self._url("postgres"), autocommit=True) as connection:
            connection.execute(statement.encode())

    @property
    def data(self) -> Path:
        """Where its files are, once it was started."""
        assert self._data is not None
        return self._data

    def give_to_postgres(self, path: Path) -> None:
        """Let the user it runs as own this file."""
        if os.geteuid() == 0:
            shutil.chown(path, "postgres", "postgres")

    def _make_data(self) -> Path:
        home = self._make_home()
        data = home / "data"
        initdb = [str(self._binary.with_name("initdb")), "--pgdata", str(data), "--username", "chatd"]
        initdb += ["--auth", "trust", "--encoding", "UTF8", "--locale", "C.UTF-8", "--no-sync"]
        self._run_tool(initdb, home)
        return data

    def _fill(self) -> None:
        """Once, after the first start."""
        self._execute("CREATE DATABASE chatd")

    def _make_home(self) -> Path:
        home = Path(
            tempfile.mkdtemp(prefix="chatd-postgres-", dir="/tmp" if os.geteuid() == 0 else self.directory)
        )
        self.give_to_postgres(home)
        return home

    def _run_tool(self, command: list[str], directory: Path) -> None:
        """One of PostgreSQL's programs that ends by itself."""
        with self.log.open("ab") as log:
            code = _launcher.submit(_spawn, self.as_user(command), directory, log).result().wait()
        if code:
            raise ServiceError(f"{Path(command[0]).name} failed.\n{self._log_tail()}")

    @staticmethod
    def as_user(command: list[str]) -> list[str]:
        # PostgreSQL refuses to run as root. The signal is set after the change of user, which would clear it.
        user = ["--reuid", "postgres", "--regid", "postgres", "--init-groups"] if os.geteuid() == 0 else []
        return ["setpriv", *user, "--pdeathsig", "KILL", *command]


class PgBouncer(Service):
    """A pooler. `mode`: session, transaction or statement; `ignored`: startup parameters it drops."""

    name = "pgbouncer"

    def __init__(self, directory: Path, server: PostgresServer, mode: str, ignored: str = "") -> None:
        super().__init__(directory)
        self._binary = _binary("pgbouncer", [Path("/usr/sbin/pgbouncer")], package="pgbouncer")
        self._home = server.data.parent  # which the user it runs as can reach
        settings = {
            "listen_addr": "127.0.0.1",
            "listen_port": self.port,
            "auth_type": "any",
            "pool_mode": mode,
            "default_pool_size": 20,
            "unix_socket_dir": "",
            "ignore_startup_parameters": ignored,
        }
        lines = ["[databases]", f"* = host=127.0.0.1 port={server.port} user=chatd", "[pgbouncer]"]
        self._file = self._home / f"pgbouncer-{self.port}.ini"
        self._file.write_text("\n".join([*lines, *(f"{key} = {value}" for key, value in settings.items())]))
        server.give_to_postgres(self._file)

    @property
    def url(self) -> str:
        return f"postgresql://chatd@127.0.0.1:{self.port}/chatd"

    def command(self) -> list[str]:
        return PostgresServer.as_user([str(self._binary), str(self._file)])

    def answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False


def free_port() -> int:
    """A loopback port nobody listens on, and below those the kernel gives to clients.

    Else a client that tries again and again while its server is down would be given that very port one day:
    it connects to itself, and the server cannot come back.
    """
    lowest_of_clients = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(10_000, max(lowest_of_clients, 10_001))
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def _spawn(command: list[str], directory: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    # A session of its own: the terminal's Ctrl-C is for the tests, which then stop it.
    return subprocess.Popen(
        command, cwd=directory, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def _binary(name: str, places: list[Path], *, package: str) -> Path:
    found = next((place for place in places if place.exists()), None) or shutil.which(name)
    if found is None:
        raise ServiceError(f"{name} is not installed: run `make test`, or `apt-get install {package}`.")
    return Path(found)


def _version(path: Path) -> tuple[int, ...]:
    return tuple(int(part) for part in path.parent.name.split(".") if part.isdecimal())


def _signal(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def _stop(pid: int) -> None:
    _signal(pid, signal.SIGSTOP)
    _wait_until(lambda: _state(pid) in "TZ", f"process {pid} goes on after SIGSTOP.")


def _children(pid: int) -> list[int]:
    pids = (int(path.name) for path in Path("/proc").glob("[0-9]*"))
    return [other for other in pids if _stat(other)[1] == str(pid)]


def _state(pid: int) -> str:
    """The letter of proc(5): T is stopped, Z has ended."""
    return _stat(pid)[0]


def _stat(pid: int) -> tuple[str, str]:
    """The state of a process, and the pid of its parent."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:  # it has ended, and its parent knows
        return "Z", ""
    # The command in parentheses may hold spaces and parentheses: what follows the last one does not.
    state, parent = text.rpartition(")")[2].split()[:2]
    return state, parent


def _wait_until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + STOP_DEADLINE
    while not condition():
        if time.monotonic() > deadline:
            raise ServiceError(otherwise)
        time.sleep(POLL)
