"""Fixtures: real services on ports of their own, real daemons, and databases that are fresh for each test."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog

from chatd.config import Database
from chatd.store.database import migrate
from tests.daemon import Daemon
from tests.services import PostgresServer, RedisServer

Daemons = Callable[..., Daemon]

# Where Rich is installed structlog takes its tracebacks, which cost seconds each: a writer would miss its
# deadline.
structlog.configure(
    processors=[
        *structlog.get_config()["processors"][:-1],
        structlog.dev.ConsoleRenderer(colors=False, exception_formatter=structlog.dev.plain_traceback),
    ]
)

# They boot a systemd, which takes root and a minute: `make test-systemd`.
collect_ignore = [] if "CHATD_TEST_SYSTEMD" in os.environ else ["booted"]

# Fixtures that start a process. A test or a module that starts its own is marked with `pytest.mark.service`.
SERVICES = {
    *("postgres", "redis_server", "own_redis", "replication", "daemons", "daemon", "deployment"),
    *("browser", "site"),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts a daemon, a server or a browser: `make test-quick` leaves it out."""
    for item in items:
        if isinstance(item, pytest.Function) and (SERVICES & set(item.fixturenames) or _on_postgresql(item)):
            item.add_marker("service")


def _on_postgresql(item: pytest.Function) -> bool:
    """Whether a fixture asks for the server only when it runs."""
    return "postgresql" in (item.callspec.params.values() if hasattr(item, "callspec") else ())


class Unmarked:
    """Fails a test that starts a process and is not marked: `make test-quick` would take it."""

    def __init__(self) -> None:
        self.running: str | None = None  # a test that may start none

    def look(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "subprocess.Popen" and self.running is not None:
            reason = f"{self.running} starts {arguments[0]}: mark it with pytest.mark.service"
            pytest.fail(reason, pytrace=False)


_unmarked = Unmarked()
sys.addaudithook(_unmarked.look)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    _unmarked.running = None if item.get_closest_marker("service") else item.nodeid


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown() -> None:
    """Servers of a whole session end with its last test, whichever that is."""
    _unmarked.running = None


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """Shared by tests that leave it running."""
    with RedisServer(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def own_redis(tmp_path: Path) -> Iterator[RedisServer]:
    """For a test that stops it."""
    directory = tmp_path / "redis"
    directory.mkdir()
    with RedisServer(directory) as server:
        yield server


@pytest.fixture
def postgres_url(postgres: PostgresServer) -> str:
    """A fresh database with the schema."""
    url = postgres.create_database()
    migrate(Database(url=url))
    return url


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh database of each kind."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path}/chatd.db"
    return str(request.getfixturevalue("postgres_url"))


@pytest.fixture
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemons]:
    """Makes started daemons, and ends them with the test."""
    made: list[Daemon] = []

    def make(**settings: Any) -> Daemon:
        made.append(Daemon(tmp_path_factory.mktemp("daemon"), **settings))
        return made[-1].start()

    yield make
    for daemon in made:
        daemon.close()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for a whole module, with open rooms and no rate on sends: tests use conversations of their own."""
    shared = Daemon(tmp_path_factory.mktemp("daemon"), limits__sends_per_second=0).start()
    yield shared
    shared.close()


@pytest.fixture
def demo(daemons: Daemons) -> Daemon:
    """`chatd serve --demo`."""
    return daemons(demo=True)


class Deployment:
    """`here` and `there` serve the same chat: one daemon by itself, or two nodes."""

    def __init__(self, here: Daemon, there: Daemon) -> None:
        self.here, self.there = here, there

    def add(self, conversation_id: int, *user_ids: int, **fields: Any) -> None:
        """Make members of them."""
        for user_id in user_ids:
            path = f"/api/ws/conversations/{conversation_id}/members/{user_id}"
            assert self.here.request("PUT", path, fields).status == 200


@pytest.fixture(scope="module", params=["one", "two"])
def deployment(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    """SQLite and no Redis; then two nodes on one PostgreSQL and one Redis. Rooms are for members."""
    settings: dict[str, Any] = {"rooms__access": "members", "limits__sends_per_second": 0}
    nodes = [Daemon(tmp_path_factory.mktemp("node"), **settings)]
    if request.param == "two":
        url = request.getfixturevalue("postgres").create_database()
        migrate(Database(url=url))
        settings |= {"database__url": url, "redis__url": request.getfixturevalue("redis_server").url}
        nodes = [Daemon(tmp_path_factory.mktemp("node"), **settings) for _ in range(2)]
    for node in nodes:
        node.start()
    yield Deployment(nodes[0], nodes[-1])
    for node in nodes:
        node.close()


_next_conversation = iter(range(1000, 10**9))


@pytest.fixture
def conversation() -> int:
    """A conversation that no other test uses."""
    return next(_next_conversation)
