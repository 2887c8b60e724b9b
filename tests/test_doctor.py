"""`chatd doctor` on machines that are well, and on machines where one thing is wrong."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import redis
import trio

from chatd import config
from chatd.config import Config
from chatd.core.limits import OPERATOR
from chatd.ops import checks
from chatd.ops.checks import data, machine
from chatd.ops.finding import Case, Finding, Level, examine, ok
from chatd.store import engine
from chatd.store.upkeep import probe
from tests.backend import serving
from tests.client import login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.nginx import Nginx
from tests.services import RedisServer, free_port
from tests.test_history import damage

pytestmark = pytest.mark.service

LONG_TOKEN = "a-token-for-tests-that-nobody-would-ever-guess"

Said = list[dict[str, Any]]


def doctor(daemon: Daemon, *arguments: str, prefix: tuple[str, ...] = (), **environ: str) -> tuple[int, Said]:
    """Its exit code, and what it found."""
    ran = subprocess.run(
        [*prefix, *daemon.program(), "doctor", "--json", *arguments],
        cwd=daemon.directory,
        env=daemon.environ | {"CHATD_API__INTERNAL_TOKEN": LONG_TOKEN} | environ,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert not ran.stderr, ran.stderr
    return ran.returncode, json.loads(ran.stdout)["findings"]


def inspected(daemon: Daemon, url: str = "", **environ: str) -> Said:
    """The same in this process, which is faster; `url` is the public one."""
    given = daemon.environ | {"CHATD_API__INTERNAL_TOKEN": LONG_TOKEN} | environ
    case = Case(config.load(None, given), url=url)

    async def all_of_it() -> list[Finding]:
        return [finding async for finding in examine(case, checks.ALL)]

    return [asdict(one) | {"level": one.level.name.lower()} for one in trio.run(all_of_it)]


def wrong(found: Said) -> dict[str, str]:
    """What is not ok: its level and what was found, by subject. Each has advice, or says it all."""
    return {one["subject"]: f"{one['level']}: {one['found']}" for one in found if one["level"] != "ok"}


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("well")
    url = f"sqlite:///{directory}/chatd.db"
    daemon = Daemon(directory, api__internal_token=LONG_TOKEN, database__url=url)
    daemon.token = LONG_TOKEN
    daemon.start()
    (directory / "chatd.db").chmod(0o600)
    yield daemon
    daemon.close()


@pytest.fixture(scope="module")
def nginx(well: Daemon, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nginx]:
    with Nginx(tmp_path_factory.mktemp("nginx"), well.hub_port) as server:
        yield server


def trusting(nginx: Nginx) -> dict[str, str]:
    return {"SSL_CERT_FILE": str(nginx.certificate)}


def test_all_is_well_and_nothing_is_left_behind(well: Daemon, nginx: Nginx) -> None:
    code, found = doctor(well, "--url", nginx.url, **trusting(nginx))
    assert (code, wrong(found)) == (0, {})
    subjects = {one["subject"] for one in found}
    assert subjects >= {"database", "directory", "open files", "round trip", "public round trip", "upgrade"}
    assert {one["subject"]: one["found"] for one in found}["round trip"].endswith(" ms")
    assert well.get(f"/api/ws/conversations/{OPERATOR}").status == 404
    assert not list(well.directory.glob("tmp*"))


def test_it_says_so_to_a_person(well: Daemon) -> None:
    ran = subprocess.run(
        [*well.program(), "doctor"], cwd=well.directory, env=well.environ, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout
    assert "\x1b" not in ran.stdout  # no terminal, no colour
    assert ran.stdout.endswith("findings, all is well.\n")
    assert all(line.startswith(("ok ", " ")) for line in ran.stdout.splitlines()[:-2])


def test_with_write_a_message_is_stored_and_deleted(daemons: Daemons) -> None:
    daemon = daemons(api__internal_token=LONG_TOKEN)
    code, found = doctor(daemon, "--write")
    daemon.token = LONG_TOKEN
    (message,) = daemon.get(f"/api/ws/conversations/{OPERATOR}/messages").json["messages"]
    assert message["content"] is None
    assert message["deleted_at"]
    assert (code, wrong(found)) == (0, {})


def test_low_limit_of_open_files(well: Daemon) -> None:
    nobody = {"CHATD_API__BIND": f"127.0.0.1:{free_port()}", "CHATD_LIMITS__CONNECTIONS": "5000"}
    code, found = doctor(well, prefix=("prlimit", "--nofile=1024:1024"), **nobody)
    assert code == 2
    assert wrong(found)["open files"] == (
        "problem: the limit here is 1024: room for 768 clients, but limits.connections allows 5000"
    )


def test_the_limit_is_that_of_the_daemon(daemons: Daemons) -> None:
    daemon = daemons(open_files=2000, api__internal_token=LONG_TOKEN)
    found = inspected(daemon)
    assert wrong(found)["open files"].startswith("warning: the daemon's limit is 2000: room for 1744")


def test_a_backend_that_gives_no_verdict(daemons: Daemons) -> None:
    with serving() as backend:
        daemon = daemons(
            api__internal_token=LONG_TOKEN, webhooks__before_message_url=backend.url, webhooks__secret="w" * 32
        )
        daemon.token = LONG_TOKEN
        assert "calls" not in wrong(inspected(daemon))
        backend.answer = lambda asked: (500, {})

        async def send() -> None:
            async with login(daemon, 7, {"1": None}) as client:
                assert (await client.request("send", conversation_id=1, content="x"))["code"] == "unavailable"

        trio.run(send)
        found = wrong(inspected(daemon))
        assert found["calls"].startswith("problem: webhooks.before_message_url: the last call")


@pytest.mark.parametrize(
    ("status", "body", "finding"),
    [
        (401, {}, None),
        (404, {}, "warning: auth.backend_url: the backend answered 404"),
        (302, {}, "problem: auth.backend_url: the backend answered 302 without a valid login"),
        (419, {}, "problem: auth.backend_url: the backend answered 419 without a valid login"),
        (200, {"data": {"user_id": "7"}}, "problem: auth.backend_url accepts the made-up token"),
    ],
)
def test_a_backend_that_answers_a_login_wrongly(
    tmp_path: Path, status: int, body: Any, finding: str | None
) -> None:
    with serving() as backend:
        backend.answer = lambda asked: (status, body)
        case = Case(config.Config(auth=config.Auth(backend_url=f"{backend.url}/api/chat/auth")))
        found = trio.run(checks.backend.login, case)
    assert found is not None
    text = f"{found.level.name.lower()}: {found.found}"
    assert text.startswith(finding or "ok: "), text
    assert bool(found.advice) == (finding is not None)


def test_dead_redis(well: Daemon) -> None:
    started = time.monotonic()
    found = inspected(well, CHATD_REDIS__URL=f"redis://127.0.0.1:{free_port()}/0")
    assert wrong(found)["Redis"].startswith("problem: does not answer: ")
    assert time.monotonic() - started < 10


def test_redis_that_forgets(well: Daemon, own_redis: RedisServer) -> None:
    with redis.Redis.from_url(own_redis.url) as client:
        client.config_set("maxmemory", "100mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        found = inspected(well, CHATD_REDIS__URL=own_redis.url)
        assert "maxmemory-policy allkeys-lru" in wrong(found)["Redis"]
        client.config_set("maxmemory-policy", "noeviction")
    found = inspected(well, CHATD_REDIS__URL=own_redis.url)
    assert "Redis" not in wrong(found)


def test_postgresql(well: Daemon, postgres_url: str, postgres: Any) -> None:
    """The tests' own has fsync off."""
    found = inspected(well, CHATD_DATABASE__URL=postgres_url)
    assert wrong(found)["database"].startswith("problem: fsync and full_page_writes off: ")
    assert "clock" not in wrong(found)
    said = " ".join(one["found"] for one in found if one["subject"] == "database")
    assert "PostgreSQL 1" in said
    assert "accepts writes" in said
    assert "a commit reaches the disk in " in said
    found = inspected(well, CHATD_DATABASE__URL=postgres.create_database())
    assert any("schema: none; this chatd needs" in one["found"] for one in found)
    found = inspected(well, CHATD_DATABASE__URL=f"postgresql://chatd@127.0.0.1:{free_port()}/x")
    assert "refused" in wrong(found)["database"]


def test_a_missing_database_is_not_made(well: Daemon, tmp_path: Path) -> None:
    found = inspected(well, CHATD_DATABASE__URL=f"sqlite:///{tmp_path}/none.db")
    assert wrong(found)["database"] == f"problem: the file {tmp_path}/none.db does not exist yet"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("table", ["chat_messages", "sqlite_schema"])
def test_a_damaged_file(well: Daemon, tmp_path: Path, table: str) -> None:
    """Where nobody has read what is damaged, and where nobody can read anything."""
    file = tmp_path / "chatd.db"
    assert well.command("backup", str(file)).returncode == 0
    database = {"CHATD_DATABASE__URL": f"sqlite:///{file}"}
    found = inspected(well, **database)
    assert any(one["found"] == "the file is intact" for one in found)
    damage(file, table)
    found = inspected(well, **database)
    assert wrong(found)["database"].startswith("problem: the file is damaged: ")
    assert any("chatd restore" in one["advice"] for one in found)


def test_a_file_that_is_too_large_to_be_read_whole(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "large.db")) as large:
        numbers = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n LIMIT 300000) SELECT i FROM n"
        large.execute(f"CREATE TABLE t AS {numbers}")
    begun = time.monotonic()
    assert probe.damage_of(tmp_path / "large.db", 0.0) is None
    assert time.monotonic() - begun < 1
    assert probe.damage_of(tmp_path / "large.db", 60.0) == ""


def test_a_locked_database_takes_no_rows(well: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "SQLITE_BUSY_SECONDS", 0.1)
    with closing(sqlite3.connect(well.directory / "chatd.db", isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        found = inspected(well)
        holder.rollback()
    assert wrong(found)["database"] == "problem: does not accept writes: database is locked"


@pytest.fixture
def anybodys() -> Iterator[Path]:
    """A directory that everybody can enter; those of pytest are closed, and so is what is in them."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def test_files_that_others_can_read(well: Daemon, anybodys: Path) -> None:
    tmp_path = anybodys
    toml = tmp_path / "chatd.toml"
    toml.write_text('[auth]\nsecret = "0123456789012345678901234567890123456789"\n')
    toml.chmod(0o644)
    token = tmp_path / "token"
    token.write_text(LONG_TOKEN)
    token.chmod(0o620)
    database = tmp_path / "open.db"
    database.touch()
    database.chmod(0o644)
    environ = {"CHATD_API__INTERNAL_TOKEN_FILE": str(token), "CHATD_DATABASE__URL": f"sqlite:///{database}"}
    code, found = doctor(well, "--config", str(toml), **environ)
    said = [
        one["found"] for one in found if one["level"] != "ok" and one["subject"] in ("secrets", "directory")
    ]
    assert code == 2
    assert said == [
        f"{toml} holds secrets, and every user of this machine can read it (-rw-r--r--)",
        f"{token} holds secrets, and its group can change it (-rw--w----)",
        f"every user of this machine can read {database} (-rw-r--r--): the messages, and the secret for tokens",
    ]
    tmp_path.chmod(0o700)  # nobody else gets there now
    assert not list(machine._too_open(toml))
    toml.write_text("[rooms]\naccess = 'open'\n")
    assert not list(machine._secret_files(Case(Config(), toml)))


def test_a_wrong_configuration_is_told_whole(well: Daemon) -> None:
    code, found = doctor(well, CHATD_HUB__PING_INTERVAL="0", CHATD_API__BIND="nowhere")
    assert code == 2
    mistakes = [one["found"] for one in found if one["subject"] == "configuration"]
    assert [mistake.split(":")[0] for mistake in mistakes] == ["hub.ping_interval", "api.bind"]
    assert "somaxconn" in {one["subject"] for one in found}


def test_another_program_on_the_port(well: Daemon, own_redis: RedisServer) -> None:
    port = f"127.0.0.1:{own_redis.port}"
    found = inspected(well, CHATD_API__BIND=port, CHATD_HUB__BIND=f"127.0.0.1:{well.api_port}")
    assert wrong(found)["HTTP API"].startswith("problem: ")
    assert wrong(found)["WebSocket"].endswith("answers with HTTP 401 instead of a WebSocket")


def test_the_token_of_another_daemon(well: Daemon) -> None:
    found = inspected(well, CHATD_API__INTERNAL_TOKEN="z" * 40)
    assert "api.internal_token here is not the daemon's" in wrong(found)["round trip"]


@pytest.mark.parametrize(
    ("without", "said"),
    [
        ("proxy_set_header Upgrade $http_upgrade;", "does not pass the header Upgrade on"),
        ("proxy_set_header Connection $chatd_connection;", "does not pass the header Connection: upgrade on"),
        ("proxy_set_header Host $host;", "the header Host is missing"),
        ("location = /ws {", "answers with HTTP 404 instead of a WebSocket"),
    ],
)
def test_a_line_that_somebody_forgot(
    well: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: str, said: str
) -> None:
    instead = "location = /elsewhere {" if without.startswith("location") else ""
    with Nginx(tmp_path, well.hub_port, without=without, instead=instead) as nginx:
        monkeypatch.setenv("SSL_CERT_FILE", str(nginx.certificate))
        found = inspected(well, nginx.url)
    assert said in wrong(found)["upgrade"]


def test_an_internal_api_that_is_passed_on(
    well: Daemon, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    everything = f"proxy_pass http://127.0.0.1:{well.api_port};"
    with Nginx(tmp_path, well.hub_port, without="return 404;", instead=everything) as nginx:
        monkeypatch.setenv("SSL_CERT_FILE", str(nginx.certificate))
        found = inspected(well, nginx.url)
    assert nginx.https + "/api/ws/users/1" in wrong(found)["internal API"]
    assert nginx.https + "/metrics" in wrong(found)["internal API"]


def test_a_certificate_that_nobody_trusts(well: Daemon, nginx: Nginx) -> None:
    found = inspected(well, nginx.url)
    assert wrong(found)["certificate"] == "problem: is not valid: self-signed certificate"
    assert "the certificate is not valid" in wrong(found)["upgrade"]


def test_without_tls(well: Daemon) -> None:
    found = inspected(well, well.ws_url)
    assert wrong(found)["certificate"].startswith("problem: ")
    assert "upgrade" not in wrong(found)


# How a check is run.


async def listed(findings: AsyncIterator[Finding]) -> list[Finding]:
    return [finding async for finding in findings]


async def test_what_a_check_raises_is_a_finding_and_what_hangs_is_left() -> None:
    async def it_hangs(case: Case) -> Finding:
        await trio.sleep_forever()
        raise AssertionError

    def it_throws(case: Case) -> Finding:
        raise KeyError("x")

    def it_is_well(case: Case) -> Finding:
        return ok("subject", "well")

    found = await listed(examine(Case(Config()), [it_hangs, it_throws, it_is_well], deadline=0.05))
    assert [finding.level for finding in found] == [Level.PROBLEM, Level.PROBLEM, Level.OK]
    assert found[0].found == "took longer than 0 s"
    assert found[1].found == "could not be checked: KeyError: 'x'"


def test_every_check_has_its_sentence() -> None:
    assert all(check.__doc__ for check in checks.ALL)


def test_a_slow_disk_and_a_wrong_clock_are_told() -> None:
    assert data._commit(0.05).level is Level.WARNING
    assert data._commit(0.003).level is Level.OK
    assert [finding.level for finding in data._clock("Redis", -7.0)] == [Level.PROBLEM]
    assert [finding.level for finding in data._clock("Redis", 2.0)] == [Level.WARNING]


def test_what_a_configuration_lays_open() -> None:
    open_to_all = config.load(
        None,
        {
            "CHATD_API__INTERNAL_TOKEN": "short",
            "CHATD_API__BIND": ":8080",
            "CHATD_HUB__BIND": "0.0.0.0:6001",
            "CHATD_HUB__ALLOW_QUERY_TOKEN": "true",
        },
    )
    case = Case(open_to_all)
    assert len([one for one in machine.exposure(case) if one.level is Level.WARNING]) == 4


def test_a_key_that_others_can_change(tmp_path: Path) -> None:
    key = tmp_path / "key.pem"
    key.touch()
    os.chmod(key, 0o666)
    auth = config.Auth(algorithms=["EdDSA"], key_files=[str(key)])
    (finding,) = machine.public_keys(Case(Config(auth=auth)))
    assert finding.level is Level.PROBLEM
