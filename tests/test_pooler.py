"""A real PgBouncer between chatd and PostgreSQL: in session mode it is fine, in transaction mode refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import psycopg
import pytest

from chatd.config import Database
from chatd.core.errors import OperatorError
from chatd.store.database import migrate, open_store
from tests.conftest import Daemons
from tests.services import PgBouncer, PostgresServer

Poolers = Callable[..., str]


@pytest.fixture
def pooler(postgres: PostgresServer, tmp_path: Path) -> Iterator[Poolers]:
    """Starts one in a mode, in front of a database with the schema; its URL."""
    with ExitStack() as stack:

        def start(mode: str, ignored: str = "") -> str:
            url = postgres.create_database()
            migrate(Database(url=url))
            one = stack.enter_context(PgBouncer(tmp_path / "pgbouncer", postgres, mode, ignored))
            return one.url.rpartition("/")[0] + "/" + url.rpartition("/")[2]

        yield start


@pytest.mark.parametrize("mode", ["transaction", "statement"])
@pytest.mark.parametrize("ignored", ["", "options"])
@pytest.mark.parametrize("warm", [1, 8], ids=["cold", "warm"])
def test_without_sessions_it_is_refused_with_what_to_change(
    pooler: Poolers, mode: str, ignored: str, warm: int
) -> None:
    """Also where other clients have made it open many sessions before."""
    url = pooler(mode, ignored)
    with ExitStack() as stack, ThreadPoolExecutor(warm) as pool:
        others = [stack.enter_context(psycopg.connect(url, autocommit=True)) for _ in range(warm)]
        list(pool.map(lambda one: one.execute("SELECT pg_sleep(0.1)"), others))
        for refused in (migrate, open_store):
            with pytest.raises(OperatorError, match="pool_mode = session"):
                refused(Database(url=url))


def test_in_session_mode_every_setting_arrives(pooler: Poolers, daemons: Daemons) -> None:
    """PgBouncer of Debian refuses `options` among the startup parameters, or drops it."""
    url = pooler("session")
    store = open_store(Database(url=url))
    with store._writing.connect() as connection:
        for name, value in {"synchronous_commit": "on", "statement_timeout": "5s", "TimeZone": "UTC"}.items():
            assert connection.exec_driver_sql(f"SHOW {name}").scalar() == value
    store.close()
    daemon = daemons(database__url=url)
    with ThreadPoolExecutor(8) as pool:
        posts = [pool.submit(daemon.post, 1, 1, f"{number}") for number in range(200)]
        assert sorted(one.result()["seq"] for one in posts) == list(range(1, 201))
