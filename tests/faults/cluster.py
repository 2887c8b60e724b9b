"""What a run is about: daemons, their database and their Redis, all real and all in this namespace.

sqlite       one chatd on SQLite, on the disk
small-disk   the same, on a tmpfs of some megabytes
two          two chatd on one PostgreSQL and one Redis
three        three of them
standby      two of them on a PostgreSQL that has a standby, whose URL names both, and one Redis
"""

from __future__ import annotations

import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psycopg

from tests.daemon import Daemon, Ended
from tests.faults.contents import Rows, connect_sqlite, of_postgres, of_sqlite
from tests.faults.workload import TOKEN
from tests.replication import ReplicatedServer, Replication
from tests.services import PostgresServer, RedisServer, ServiceError

SECRET = "a secret of the fault tests alone, long enough"
PING_INTERVAL, PING_TIMEOUT = 2.0, 2.0  # seconds: a half-open peer is found within a phase
DRAIN_WINDOW = 0.5
STARTS = 50  # attempts while the database is away
EX_TEMPFAIL = 75  # of sysexits.h: another attempt may succeed
SMALL_DISK = 48  # MB
FAKETIME = sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))
FAKETIME_FILE = "clock"

KINDS = ("sqlite", "small-disk", "two", "three", "standby")
NODES = {"two": 2, "three": 3, "standby": 2}  # else it is one, on SQLite


class Node(Daemon):
    """A chatd that may have a bug planted, or a clock of its own. `ended` counts ends that were not good."""

    # A thousand clients that want to come back take their time, too, and a faked clock is dear to look at.
    start_seconds = stop_seconds = 60

    def __init__(self, directory: Path, name: str, bug: str | None, **settings: Any) -> None:
        super().__init__(
            directory,
            api__internal_token=TOKEN,
            auth__secret=SECRET,
            rooms__access="members",
            hub__ping_interval=PING_INTERVAL,
            hub__ping_timeout=PING_TIMEOUT,
            server__drain_window=DRAIN_WINDOW,
            limits__sends_per_second=0,
            limits__handshakes_per_second=0,
            limits__rooms_per_connection=1000,
            **settings,
        )
        self.name, self.token = name, TOKEN
        self.bug = bug
        self.faked = False
        self.ended = 0
        self.repairs = self.restarts_over = 0  # told by /metrics, over all lives of the process
        self.peak = 0  # bytes
        self._seen: dict[str, float] = {}

    def program(self) -> list[str]:
        planted = ["-m", "tests.faults.planted", self.bug] if self.bug else ["-m", "chatd"]
        return [sys.executable, *planted]

    def start(self) -> Node:
        self._seen.clear()
        if self.faked:
            self.step_clock(0)
            clock = {
                "LD_PRELOAD": str(FAKETIME[0]),
                "FAKETIME_TIMESTAMP_FILE": str(self.directory / FAKETIME_FILE),
                "FAKETIME_NO_CACHE": "1",
                "DONT_FAKE_MONOTONIC": "1",
            }
            before, self.environ = self.environ, self.environ | clock
            try:
                self._start_again()
            finally:
                self.environ = before
        else:
            self._start_again()
        return self

    def _start_again(self) -> None:
        """As a service manager does where the database went away during the start."""
        for _ in range(STARTS):
            try:
                super().start()
                return
            except Ended as end:
                if end.code != EX_TEMPFAIL:
                    raise
                time.sleep(0.1)
        raise AssertionError(f"the database was away at {STARTS} starts")

    def step_clock(self, seconds: int) -> None:
        """Only for a node that was started as `faked`: its wall clock is now so far off."""
        (self.directory / FAKETIME_FILE).write_text(f"{seconds:+d}s\n")

    def look(self) -> None:
        """Take the numbers that it tells, and what the kernel tells of it. Not while it is frozen or down."""
        with suppress(OSError):
            status = Path(f"/proc/{self.pid}/status").read_text()
            if found := re.search(r"VmHWM:\s+(\d+) kB", status):
                self.peak = max(self.peak, int(found[1]) * 1024)

    def count(self, metrics: str) -> None:
        """A counter starts at nought with each life of the process."""
        for name, attribute in (("chatd_gap_fills_total", "repairs"), ("chatd_resets_total", "restarts_over")):
            if found := re.findall(rf"^{name}(?:{{.*}})? (\S+)$", metrics, re.MULTILINE):
                value = sum(map(float, found))
                grown = value - self._seen.get(name, 0.0)
                self._seen[name] = value
                setattr(self, attribute, getattr(self, attribute) + max(0, int(grown)))

    def troubles(self) -> list[str]:
        """What no daemon may do, whatever happens to it."""
        found = []
        if self.ended:
            found.append(f"{self.name} ended {self.ended} times by itself")
        if "Traceback" in self.log:
            lines = self.log.splitlines()
            first = next(number for number, line in enumerate(lines) if "Traceback" in line)
            found.append(f"{self.name} logged a traceback: " + "\n".join(lines[max(0, first - 2) : first + 40]))
        return found


class Cluster:
    def __init__(self, kind: str, directory: Path, bug: str | None = None, **settings: Any) -> None:
        """`settings` are those of all nodes, beside where their services are."""
        self.kind, self._directory, self._bug = kind, directory, bug
        self._settings = settings
        self._stack = ExitStack()
        self.redis: RedisServer | None = None
        self.postgres: PostgresServer | None = None  # the primary, where there are two of them
        self.replication: Replication | None = None
        self._standbys: list[ReplicatedServer] = []  # that took the place of one that died
        self.nodes: list[Node] = []
        self.disk = directory  # where SQLite's file is

    def __enter__(self) -> Cluster:
        with ExitStack() as stack:
            settings = self._services(stack) | self._settings
            for number in range(1, NODES.get(self.kind, 1) + 1):
                place = self._directory / f"node-{number}"
                place.mkdir()
                self.nodes.append(Node(place, f"node {number}", self._bug, **settings))
                stack.callback(self.nodes[-1].close)
            if self.postgres is not None:
                migrated = self.nodes[0].command("migrate")
                if migrated.returncode:
                    raise ServiceError(migrated.stderr)
            for node in self.nodes:
                node.start()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _services(self, stack: ExitStack) -> dict[str, Any]:
        if self.kind in NODES:
            url = self._start_postgres(stack)
            self.redis = stack.enter_context(RedisServer(self._directory / "redis"))
            return {"database__url": url, "redis__url": self.redis.url}
        self.disk = self._directory / "disk"
        self.disk.mkdir()
        if self.kind == "small-disk":
            stack.enter_context(_mounted(self.disk))
        return {"database__url": f"sqlite:///{self.disk}/chatd.db"}

    def _start_postgres(self, stack: ExitStack) -> str:
        if self.kind != "standby":
            self.postgres = stack.enter_context(PostgresServer(self._directory / "postgres"))
            return self.postgres.url
        self.replication = stack.enter_context(Replication(self._directory / "postgres"))
        self.postgres = self.replication.primary
        stack.callback(self._close_standbys)
        return self.replication.url

    def _close_standbys(self) -> None:
        for server in self._standbys:
            server.close()

    def new_standby(self, primary: PostgresServer, port: int) -> ReplicatedServer:
        """Not started yet; it is closed with the cluster."""
        directory = self._directory / "postgres" / f"standby-{len(self._standbys) + 1}"
        self._standbys.append(ReplicatedServer(directory, primary=primary))
        self._standbys[-1].port = port
        return self._standbys[-1]

    @property
    def ports(self) -> list[int]:
        return [node.hub_port for node in self.nodes]

    @property
    def api_ports(self) -> list[int]:
        return [node.api_port for node in self.nodes]

    @property
    def rows(self) -> Rows:
        return of_postgres(self.postgres.url) if self.postgres is not None else of_sqlite(self.file)

    @property
    def file(self) -> Path:
        """SQLite's."""
        return self.disk / "chatd.db"

    def sound(self) -> bool:
        """SQLite's own check of its file; PostgreSQL has none that would be worth its time."""
        return self.postgres is not None or self.rows("PRAGMA integrity_check") == [("ok",)]

    def execute(self, statement: str) -> None:
        assert self.postgres is not None
        with psycopg.connect(self.postgres.url, autocommit=True, connect_timeout=2) as connection:
            connection.execute(statement.encode())

    def connect_sqlite(self) -> sqlite3.Connection:
        return connect_sqlite(self.file)

    def copy_sqlite(self, target: Path) -> None:
        """As a backup does it, while chatd writes."""
        with closing(self.connect_sqlite()) as live, closing(connect_sqlite(target)) as copy:
            live.backup(copy)

    def put_back(self, copy: Path, aside: Path) -> None:
        """A copy takes the place of SQLite's file, whether chatd runs or not; what was there goes aside."""
        fresh = self.disk / "fresh.db"
        shutil.copy(copy, fresh)
        for suffix in ("-wal", "-shm"):  # first: they shall not be taken for those of the copy
            with suppress(FileNotFoundError):
                Path(f"{self.file}{suffix}").rename(f"{aside}{suffix}")
        aside.hardlink_to(self.file)
        fresh.replace(self.file)


@contextmanager
def _mounted(place: Path) -> Iterator[None]:
    """A tmpfs; seen in this mount namespace alone."""
    options = ["-t", "tmpfs", "-o", f"size={SMALL_DISK}m", "chatd-faults", str(place)]
    subprocess.run(["mount", *options], check=True)
    try:
        yield
    finally:
        for _ in range(50):  # until the last descriptor is closed
            if subprocess.run(["umount", str(place)], capture_output=True).returncode == 0:
                break
            time.sleep(0.1)
