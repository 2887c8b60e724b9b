"""Configuration: one file that lists everything, every mistake at once, and sentences instead of tracebacks."""

from __future__ import annotations

import itertools
import json
import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest

from chatd import config
from chatd.config import redis_url
from chatd.core.errors import ConfigError
from chatd.ops.showing import as_toml
from chatd.store import urls
from chatd.store.failures import is_unanswered
from tests.daemon import Daemon
from tests.services import RedisServer, free_port

SAMPLE = Path(__file__).parent.parent / "chatd.toml"


def load(
    text: str = "", tmp_path: Path | None = None, /, *, demo: bool = False, **environ: str
) -> config.Config:
    path = None
    if tmp_path is not None:
        path = tmp_path / "chatd.toml"
        path.write_text(text)
    return config.load(path, {"CHATD_API__INTERNAL_TOKEN": "t"} | environ, demo=demo)


def mistakes(text: str, tmp_path: Path, **environ: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        load(text, tmp_path, **environ)
    return list(refused.value.mistakes)


def test_the_sample_lists_every_option_with_its_default() -> None:
    sample = tomllib.loads(SAMPLE.read_text())
    assert sample == {k: v for k, v in msgspec.to_builtins(config.Config()).items() if k != "demo"}


def test_the_sample_explains_every_option() -> None:
    lines = SAMPLE.read_text().splitlines()
    for before, line in itertools.pairwise(lines):
        assert not re.match(r"\w+ =", line) or before.startswith("# "), line


def test_all_mistakes_are_reported_at_once_with_their_keys(tmp_path: Path) -> None:
    found = mistakes(
        '[hub]\nbnid = "x"\nping_interval = 0\norigins = ["example.com"]\n[lim]\n'
        '[limits]\nframe_bytes = "many"\n[database]\nurl = "mysql://x"\n',
        tmp_path,
        CHATD_API__BIND="8080",
    )
    keys = [mistake.split(":")[0] for mistake in found]
    assert sorted(keys) == [
        "[lim]", "api.bind", "database.url", "hub.bnid", "hub.ping_interval", "limits.frame_bytes",
    ]  # fmt: skip
    assert "did you mean bind?" in found[keys.index("hub.bnid")]
    found = mistakes(
        '[database]\nurl = "mysql://x"\n[hub]\norigins = ["example.com"]', tmp_path, CHATD_API__BIND="8080"
    )
    assert sorted(m.split(":")[0] for m in found) == ["api.bind", "database.url", "hub.origins"]


def test_the_environment_wins_over_credentials_and_they_over_the_file(tmp_path: Path) -> None:
    secrets = tmp_path / "credentials"
    secrets.mkdir()
    (secrets / "database.url").write_text("postgresql://from-credential/x\n")
    (secrets / "api.internal_token").write_text("from-credential\n")
    (secrets / "of.another.program").write_text("ignored")
    (tmp_path / "secret").write_text("0123456789" * 4 + "\n")
    loaded = load(
        '[database]\nurl = "postgresql://from-file/x"\n[limits]\nconnections = 5',
        tmp_path,
        CREDENTIALS_DIRECTORY=str(secrets),
        CHATD_API__INTERNAL_TOKEN="from-environment",
        CHATD_AUTH__SECRET_FILE=str(tmp_path / "secret"),
        CHATD_LIMITS__CONNECTIONS="7",
        CHATD_HUB__ORIGINS="https://a.example, https://b.example",
        CHATD_HUB__ALLOW_QUERY_TOKEN="true",
    )
    assert loaded.database.url == "postgresql://from-credential/x"
    assert loaded.api.internal_token == "from-environment"
    assert loaded.auth.secret == "0123456789" * 4
    assert loaded.limits.connections == 7
    assert loaded.hub.origins == ["https://a.example", "https://b.example"]
    assert loaded.hub.allow_query_token is True


def test_the_names_of_the_original_deployment_still_work() -> None:
    loaded = config.load(None, {"WS_INTERNAL_TOKEN": "t", "REDIS_HOST": "cache", "REDIS_PORT": "6380"})
    assert (loaded.api.internal_token, loaded.redis.url) == ("t", "redis://cache:6380/0")


def test_the_log_names_an_original_name_that_sets_an_option(tmp_path: Path, redis_server: RedisServer) -> None:
    """REDIS_HOST may be there for another program, and makes chatd use Redis all the same."""
    daemon = Daemon(tmp_path)
    daemon.environ |= {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(redis_server.port)}
    try:
        daemon.start()
        assert daemon.get("/readyz").json["checks"]["redis"] == "ok"
        told = [json.loads(line) for line in daemon.log.splitlines() if "original_name_used" in line]
        assert [(one["variable"], one["option"]) for one in told] == [("REDIS_HOST", "redis.url")]
    finally:
        daemon.close()


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("redis://host", {"host": "host"}),
        ("redis://:pw@host:6380/3", {"host": "host", "port": 6380, "db": 3, "password": "pw"}),
        ("redis://me:p%40ss%2Fw%23rd@[::1]", {"host": "::1", "username": "me", "password": "p@ss/w#rd"}),
        ("tcp://127.0.0.1:6379?database=1", {"host": "127.0.0.1", "db": 1}),  # as Laravel writes it
        ("tls://me:pw@host:6380?database=1", {"host": "host", "port": 6380, "db": 1, "tls": True,
         "username": "me", "password": "pw"}),
        ("unix://:pw@/run/redis.sock?db=2", {"socket": "/run/redis.sock", "db": 2, "password": "pw"}),
        ("unix:///run/redis.sock?username=me&password=p%26w", {"socket": "/run/redis.sock", "username": "me",
         "password": "p&w"}),
        ("rediss://host?ssl_ca_certs=/ca.crt&ssl_check_hostname=false&ssl_certfile=/c&ssl_keyfile=/k",
         {"host": "host", "tls": True, "ca_certs": "/ca.crt", "check_hostname": False, "certfile": "/c",
         "keyfile": "/k"}),
        ("rediss://host/0?ssl_cert_reqs=none&db=0", {"host": "host", "tls": True, "verify": False}),
    ],
)  # fmt: skip
def test_what_redis_url_may_say(tmp_path: Path, url: str, place: dict[str, Any]) -> None:
    assert load("", tmp_path, CHATD_REDIS__URL=url).redis.url == url
    assert redis_url.read(url) == redis_url.Address(**place)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        ("redis://h?timeout=1", "option timeout"),
        ("redis://h?read_timeout=5", "option read_timeout"),
        ("redis://h?socket_timeout=0.01", "option socket_timeout"),
        ("redis://h?protocol=3", "option protocol"),
        ("redis://h?decode_responses=true", "option decode_responses"),
        ("redis://h?databse=1", "did you mean database?"),
        ("redis://h/0?database=1", "database is given twice"),
        ("redis://h?database=one", "database must be"),
        ("redis://h/one", "number of a database"),
        ("redis://h?ssl_ca_certs=/ca.crt", "rediss://"),
        ("rediss://h?ssl_cert_reqs=maybe", "required or none"),
        ("rediss://h?ssl_ca_certs=", "is empty"),
        ("redis://h:0", "redis://host:6379/0"),
        ("unix://run/redis.sock", "three slashes"),
        ("redis://:p@ss/w#rd@h", "%-code"),
        ("redis://:p@ss/word@h", "%-code"),
        ("redis://h?ss word@h", "%-code"),
    ],
)
def test_what_redis_url_may_not_say_is_refused_in_a_sentence(tmp_path: Path, url: str, word: str) -> None:
    (found,) = mistakes("", tmp_path, CHATD_REDIS__URL=url)
    assert found.startswith("redis.url: ") and found.endswith(".") and word in found
    assert "w#rd" not in found and "word@h" not in found, "a part of the password is shown"


@pytest.mark.parametrize(
    ("environ", "key"),
    [
        ({"CHATD_AUTH__SECRET": "short"}, "auth.secret"),
        ({"CHATD_AUTH__BACKEND_URL": "ftp://x"}, "auth.backend_url"),
        ({"CHATD_REDIS__FOREIGN_CHANNELS": "x" * 201}, "redis.foreign_channels"),
        ({"CHATD_REDIS__URL": "localhost:6379"}, "redis.url"),
        ({"CHATD_REDIS__URL": "redis://h:abc/0"}, "redis.url"),
        ({"CHATD_REDIS__URL": "redis://redis..internal"}, "redis.url"),
        ({"CHATD_DATABASE__URL": "postgresql://h:abc/db"}, "database.url"),
        ({"CHATD_DATABASE__URL": "postgresql://["}, "database.url"),
        ({"CHATD_HUB__ORIGINS": "https://["}, "hub.origins"),
        ({"CHATD_DATABASE__URL": "sqlite://"}, "database.url"),
        ({"CHATD_LIMITS__TRUSTED_PROXIES": "proxy"}, "limits.trusted_proxies"),
        ({"CHATD_SERVER__WORKERS": "2"}, "server.workers"),
        ({"CHATD_HBU__BIND": "x"}, "CHATD_HBU__BIND"),
        ({"CHATD_AUTH__SECRET_FILE": "/nowhere"}, "CHATD_AUTH__SECRET_FILE"),
        ({"CHATD_AUTH__SECRET": "x" * 31}, "auth.secret"),
        ({"CHATD_AUTH__SECRET": "x" * 47, "CHATD_AUTH__ALGORITHMS": "HS256,HS384"}, "auth.secret"),
        ({"CHATD_AUTH__PREVIOUS_SECRET": "x" * 63, "CHATD_AUTH__ALGORITHMS": "HS512"}, "auth.previous_secret"),
        ({"CHATD_AUTH__ALGORITHMS": "HS512", "CHATD_AUTH__KEY_FILES": "a.pem"}, "auth.algorithms"),
    ],
)
def test_what_cannot_be_meant_is_refused_under_its_key(
    tmp_path: Path, environ: dict[str, str], key: str
) -> None:
    found = mistakes("", tmp_path, **environ)
    assert found[0].startswith(f"{key}: "), found


def test_the_demo_is_for_this_machine_alone(tmp_path: Path) -> None:
    shown = load(SAMPLE.read_text(), tmp_path, demo=True, CHATD_API__INTERNAL_TOKEN="secret")
    assert (shown.rooms.access, shown.hub.allow_query_token, shown.api.internal_token) == (
        "open",
        True,
        "secret",
    )
    with pytest.raises(ConfigError, match=r"hub\.bind"):
        load("", tmp_path, demo=True, CHATD_HUB__BIND=":6001")


def test_binds_may_be_ipv6_or_every_address() -> None:
    assert config.split_bind("[::1]:80") == ("::1", 80)
    assert config.split_bind(":6001") == ("", 6001)
    for bad in ("8080", "host:", "host:x", "host:70000", "host:-1"):
        with pytest.raises(ValueError, match=bad):
            config.split_bind(bad)


# The commands.


@pytest.mark.service
def test_a_wrong_configuration_ends_with_78_and_every_mistake(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, api__internal_token="", hub__bnid="x")
    for command in ("check-config", "serve"):
        ended = daemon.command(command)
        assert ended.returncode == 78
        assert "hub.bnid" in ended.stderr
        assert "Traceback" not in ended.stderr
    daemon = Daemon(tmp_path, api__internal_token="")
    assert "api.internal_token: is empty" in daemon.command("serve").stderr
    valid = Daemon(tmp_path).command("check-config")
    assert valid.returncode == 0
    assert "valid" in valid.stdout


@pytest.mark.service
def test_no_token_is_needed_where_no_backend_is_served(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, api__internal_token="")
    early = daemon.command("token", "7")
    assert (early.returncode, "no token would be valid" in early.stderr) == (1, True)
    migrated = daemon.command("migrate")
    assert (migrated.returncode, migrated.stdout) == (
        0,
        "The schema was migrated from an empty database to version 0005.\n",
    )
    assert daemon.command("migrate").stdout == "The schema is already at version 0005.\n"
    made = daemon.command("token", "7", "--ttl", "60")
    assert made.returncode == 0
    assert made.stdout.count(".") == 2


def test_a_postgresql_without_the_schema_says_what_to_run(postgres, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    daemon = Daemon(tmp_path, database__url=postgres.create_database())
    ended = daemon.command("serve")
    assert ended.returncode == 78
    assert "Run `chatd migrate`" in ended.stderr


@pytest.mark.service
@pytest.mark.parametrize(
    ("url", "sentence"),
    [
        ("sqlite:////nowhere/at/all.db", "the directory /nowhere/at"),
        ("sqlite:///x.db?timeout=abc", "database.url"),
        ("sqlite:///file:x?mode=memory&uri=true", "database.url"),
    ],
)
def test_a_database_that_cannot_be_opened_is_said_in_a_sentence(
    tmp_path: Path, url: str, sentence: str
) -> None:
    ended = Daemon(tmp_path, database__url=url).command("serve")
    assert ended.returncode in (1, 78)
    assert sentence in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.service
def test_no_postgresql_at_the_start_is_told_with_all_its_hosts(tmp_path: Path) -> None:
    first, second = free_port(), free_port()
    url = f"postgresql://chatd:secret-word@127.0.0.1:{first},127.0.0.1:{second}/chatd"
    ended = Daemon(tmp_path, database__url=url).command("serve")
    assert ended.returncode == 75
    (line,) = ended.stderr.splitlines()
    assert f"cannot use PostgreSQL at 127.0.0.1:{first}, 127.0.0.1:{second} (Connection refused)" in line
    assert "Start PostgreSQL there" in line
    assert "secret-word" not in line


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (psycopg.OperationalError("connection refused"), True),
        (psycopg.errors.AdminShutdown(), True),
        (psycopg.errors.CrashShutdown(), True),
        (psycopg.errors.CannotConnectNow(), True),
        (psycopg.errors.TooManyConnections(), True),
        (psycopg.errors.ReadOnlySqlTransaction(), True),
        (psycopg.errors.ConnectionFailure(), True),
        (psycopg.errors.InvalidPassword(), False),
        (psycopg.errors.UndefinedTable(), False),
        (psycopg.ProgrammingError("no such option"), False),
    ],
)
def test_what_ends_a_start_with_75_may_pass(error: psycopg.Error, passing: bool) -> None:
    """A service manager tries again after that, where a mistake of the operator's stays one."""
    assert is_unanswered(error) == passing


@pytest.mark.parametrize(
    ("url", "named"),
    [
        ("postgresql://h/db", ["h:5432"]),
        ("postgresql:///db", ["the local socket"]),
        ("postgresql://u:p@h1,[::1]:6/db", ["h1:5432", "[::1]:6"]),
        ("postgresql:///db?host=/run/postgresql", ["/run/postgresql"]),
        ("postgresql:///db?host=h1&host=h2&port=6", ["h1:6", "h2:6"]),
    ],
)
def test_the_servers_of_a_url(url: str, named: list[str]) -> None:
    assert urls.servers(url) == named


@pytest.mark.service
def test_help_fits_on_a_screen(tmp_path: Path) -> None:
    shown = Daemon(tmp_path).command("--help")
    assert shown.returncode == 0
    assert all(f"  {name}" in shown.stdout for name in ("serve", "check-config", "migrate", "token"))
    assert len(shown.stdout.splitlines()) <= 24


@pytest.mark.parametrize("text", ["whsec_" + "é" * 40, "whsec_" + "ab-_" * 10, "whsec_" + 31 * "a"])
def test_a_secret_of_standard_webhooks_holds_a_key(tmp_path: Path, text: str) -> None:
    (found,) = mistakes(f'[api]\ninternal_token = "t"\n[webhooks]\nsecret = "{text}"', tmp_path)
    assert found.startswith("webhooks.secret: after whsec_ it needs at least 24 bytes")
    for right in ("a" * 32, "whsec_" + "ab+/" * 8):
        config.load(None, {"CHATD_API__INTERNAL_TOKEN": "t", "CHATD_WEBHOOKS__SECRET": right})


def test_what_is_in_effect_is_shown_without_secrets(tmp_path: Path) -> None:
    (tmp_path / "credentials").mkdir()
    (tmp_path / "credentials" / "redis.url").write_text("redis://:verysecret@127.0.0.1:6379/0")
    toml = tmp_path / "chatd.toml"
    toml.write_text(
        '[auth]\nsecret = "verysecret-verysecret-verysecret-verysecret"\n'
        '[rooms]\naccess = "open"\n[limits]\nconnections = 5\nsends_per_second = 10\n'
    )
    origins: config.Origins = {}
    shown = as_toml(
        config.load(
            toml,
            {
                "CREDENTIALS_DIRECTORY": str(tmp_path / "credentials"),
                "WS_INTERNAL_TOKEN": "verysecret",
                "CHATD_API__PREVIOUS_INTERNAL_TOKEN": "verysecret",
                "CHATD_LIMITS__CONNECTIONS": "7",
                "CHATD_DATABASE__URL": "postgresql://chatd:p@verysecret@db/chatd?sslpassword=verysecret&x=1",
                "CHATD_HUB__ORIGINS": "https://a.example.com,https://b.example.com",
            },
            origins=origins,
        ),
        origins,
    )
    assert "verysecret" not in shown
    repr_of_open = '"open"'
    options = {line.split(" = ")[0]: line for line in shown.splitlines() if " = " in line}
    assert options["access"] == f"{'access = ' + repr_of_open:<40}  # {toml}"
    assert options["connections"].split() == ["connections", "=", "7", "#", "CHATD_LIMITS__CONNECTIONS"]
    assert options["sends_per_second"] == "sends_per_second = 10"  # the default, though written down
    assert options["internal_token"].endswith("# WS_INTERNAL_TOKEN")
    read = tomllib.loads(shown)
    assert read["database"]["url"] == "postgresql://chatd:(hidden)@db/chatd?sslpassword=(hidden)&x=1"
    assert read["redis"]["url"] == "redis://:(hidden)@127.0.0.1:6379/0"
    assert read["hub"]["origins"] == ["https://a.example.com", "https://b.example.com"]
    assert read["auth"]["secret"] == read["api"]["internal_token"] == "(hidden)"
    assert set(read) == set(config.SECTIONS)


def test_show_is_a_command(daemon: Daemon) -> None:
    ran = daemon.command("check-config", "--show")
    assert ran.returncode == 0
    assert daemon.token not in ran.stdout
    assert tomllib.loads(ran.stdout)["api"]["bind"] == f"127.0.0.1:{daemon.api_port}"


@pytest.mark.parametrize(
    ("origin", "better"),
    [
        ("https://App.Example.com", "https://app.example.com"),
        ("https://app.example.com:443", "https://app.example.com"),
        ("http://app.example.com:80", "http://app.example.com"),
        ("https://user@app.example.com", "https://app.example.com"),
        ("https://app.example.com/", "https://app.example.com"),
        ("https://app.example.com/chat?x", "https://app.example.com"),
        ("Capacitor://localhost", "capacitor://localhost"),
        ("app.example.com", "https://chat.example.com"),
        ("*", "https://*.example.com"),
        ("https://*", "https://*.example.com"),
        ("https://*.com", "https://*.example.com"),
        ("https://app.*.com", "https://*.example.com"),
        ("https://*app.example.com", "https://*.example.com"),
        ("capacitor://*.localhost", "https://*.example.com"),
        ("https://", "https://chat.example.com"),
        ("https://bücher.example", "xn--"),
        ("https://app.example.com:0", "port"),
    ],
)
def test_an_origin_that_would_never_match_is_refused(origin: str, better: str) -> None:
    with pytest.raises(ConfigError) as refused:
        config.load(None, {"CHATD_API__INTERNAL_TOKEN": "t" * 32, "CHATD_HUB__ORIGINS": origin})
    (sentence,) = refused.value.mistakes
    assert sentence.startswith("hub.origins: ")
    assert better in sentence


def test_which_origins_an_entry_lets_in() -> None:
    listed = [
        *(
            "https://app.example.com",
            "https://*.example.org",
            "http://*.dev.example:8080",
            "https://[::1]:8443",
        ),
        *("capacitor://localhost", "ionic://localhost", "tauri://localhost", "app://-", "file://", "null"),
        "chrome-extension://abcdef",
    ]
    environ = {"CHATD_API__INTERNAL_TOKEN": "t" * 32, "CHATD_HUB__ORIGINS": ",".join(listed)}
    allow = config.AllowedOrigins(config.load(None, environ).hub.origins).allow
    below = ["https://a.example.org", "https://a.b.example.org", "http://x.dev.example:8080"]
    for origin in [*(one for one in listed if "*" not in one), *below]:
        assert allow(origin, "chat.example.com"), origin
    for origin in (
        *("http://app.example.com", "https://app.example.com:8443", "https://app.example.com.evil.com", ""),
        *(
            "https://example.org",
            "http://a.example.org",
            "https://a.example.org:8443",
            "https://evilexample.org",
        ),
        *("https://evil.com/.example.org", "https://evil.com#.example.org", "https://u@a.example.org"),
        *("https://.example.org", "https://*.example.org", "http://x.dev.example", "https://chat.example.com"),
        *("capacitor://localhost.evil.com", "capacitor://evil", "app://x", "https://localhost"),
    ):
        assert not allow(origin, "chat.example.com"), origin
