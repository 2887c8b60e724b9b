"""Streaming replication between two real PostgreSQL servers, and an address that leads to one of them.

The second server can be held back, so that its promotion loses what the first one has acknowledged.
"""

from __future__ import annotations

import socket
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psycopg

from tests.services import POLL, PostgresServer, ServiceError

PATIENCE = 20.0  # seconds for what PostgreSQL does by itself
STANDBY = "standby"  # its application_name, by which synchronous_standby_names knows it
CHUNK = 65536


class ReplicatedServer(PostgresServer):
    """A primary, or the standby of one; which of the two it is can change.

    It is started as a standby where `primary` is given, with a copy of that server's data.
    """

    def __init__(self, directory: Path, *, primary: PostgresServer | None = None) -> None:
        super().__init__(directory)
        self._primary = primary

    def execute(self, statement: str) -> list[Any]:
        """Rows, if there are any."""
        with psycopg.connect(self.url, autocommit=True, connect_timeout=5) as connection:
            cursor = connection.execute(statement.encode())
            return cursor.fetchall() if cursor.description else []

    def scalar(self, query: str) -> Any:
        return self.execute(query)[0][0]

    def follow(self, primary: PostgresServer) -> None:
        """Be the standby of that server from the next start on."""
        signal_file = self.data / "standby.signal"
        signal_file.touch()
        self.give_to_postgres(signal_file)
        with (self.data / "postgresql.auto.conf").open("a") as settings:
            settings.write(f"primary_conninfo = '{_conninfo(primary)}'\n")
            settings.write("recovery_target_timeline = 'latest'\n")

    def hold(self) -> None:
        """As a standby: receive nothing more. What the primary commits from now on is not here."""
        self._receive_from("")
        self.wait_for("SELECT count(*) = 0 FROM pg_stat_wal_receiver")

    def let_go(self, primary: PostgresServer) -> None:
        self._receive_from(_conninfo(primary))

    def promote(self) -> None:
        """Return when it takes writes."""
        self.execute("SELECT pg_promote(true, 60)")
        self.wait_for("SELECT NOT pg_is_in_recovery()")

    def wait_for(self, query: str) -> None:
        """Until the query's one value is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.scalar(query):
            if time.monotonic() > deadline:
                raise ServiceError(f"{query} was not true within {PATIENCE:.0f} s.\n{self._log_tail()}")
            time.sleep(POLL)

    def _receive_from(self, conninfo: str) -> None:
        self.execute(f"ALTER SYSTEM SET primary_conninfo = '{conninfo}'")
        self.execute("SELECT pg_reload_conf()")

    def _make_data(self) -> Path:
        if self._primary is None:
            return super()._make_data()
        home = self._make_home()
        data = home / "data"
        copy = [str(self._binary.with_name("pg_basebackup")), "--pgdata", str(data), "--no-sync"]
        copy += ["--checkpoint=fast", "--write-recovery-conf", "--dbname", _conninfo(self._primary)]
        self._run_tool(copy, home)
        return data

    def _fill(self) -> None:
        if self._primary is None:
            super()._fill()


class Replication:
    """Two servers: `primary` and its `standby`. A context manager starts both, and closes both.

    Asynchronous, unless `synchronous`: then a commit waits until the standby has it on its disk.
    """

    def __init__(self, directory: Path, *, synchronous: bool = False) -> None:
        self.primary = ReplicatedServer(directory / "first")
        self.standby = ReplicatedServer(directory / "second", primary=self.primary)
        self._synchronous = synchronous
        self._stack = ExitStack()

    @property
    def url(self) -> str:
        """It names both, as an operator would."""
        hosts = ",".join(f"127.0.0.1:{server.port}" for server in (self.primary, self.standby))
        return f"postgresql://chatd@{hosts}/chatd?target_session_attrs=read-write"

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(self.primary)
            stack.enter_context(self.standby)
            self.wait_for_streaming()
            if self._synchronous:
                self.make_synchronous()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def make_synchronous(self) -> None:
        self.primary.execute(f"ALTER SYSTEM SET synchronous_standby_names = '{STANDBY}'")
        self.primary.execute("SELECT pg_reload_conf()")
        self.primary.wait_for("SELECT count(*) = 1 FROM pg_stat_replication WHERE sync_state = 'sync'")

    def wait_for_streaming(self) -> None:
        streams = f"application_name = '{STANDBY}' AND state = 'streaming'"
        self.primary.wait_for(f"SELECT count(*) = 1 FROM pg_stat_replication WHERE {streams}")

    def catch_up(self) -> None:
        """Return when the standby has everything that the primary has now."""
        position = self.primary.scalar("SELECT pg_current_wal_insert_lsn()")
        self.primary.execute("SELECT pg_switch_wal()")  # what no transaction has flushed yet goes too
        self.standby.wait_for(f"SELECT pg_last_wal_replay_lsn() >= '{position}'")

    def fail_over(self) -> None:
        """The primary dies, the standby takes its place with what it has. `primary` is the new one then."""
        self.primary.kill()
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary

    def switch_over(self) -> None:
        """The primary stops in an orderly way, and comes back as the standby of the one that was its own."""
        self.primary.stop()
        self.standby.promote()
        self.primary, self.standby = self.standby, self.primary
        self.standby.follow(self.primary)
        self.standby.start()


class Address:
    """A TCP address that leads to a port and can be moved, as a proxy's. Connections stay where they are."""

    def __init__(self, port: int) -> None:
        self.leads_to = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self._sockets: list[socket.socket] = []
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def url(self) -> str:
        return f"postgresql://chatd@127.0.0.1:{self.port}/chatd"

    def close(self) -> None:
        for one in (self._listener, *self._sockets):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(("127.0.0.1", self.leads_to))
                except OSError:
                    near.close()
                    continue
                self._sockets += [near, far]
                for pair in ((near, far), (far, near)):
                    threading.Thread(target=_pump, args=pair, daemon=True).start()


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(CHUNK):
            target.sendall(data)
    for one in (source, target):
        with suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)


def _conninfo(server: PostgresServer) -> str:
    return f"host=127.0.0.1 port={server.port} user=chatd application_name={STANDBY}"
