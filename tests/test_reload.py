"""SIGHUP: what may change while chatd runs does, all of it or nothing; nobody is disconnected."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jwt
import pytest
import trio
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chatd.auth.tokens import Tokens
from chatd.config import Config, Hub, Limits, Redis
from chatd.config.settings import Settings, merge
from tests.client import awake, connect, login
from tests.daemon import START_SECONDS, Daemon
from tests.test_security import refused

pytestmark = pytest.mark.service

OLD, NEW = "o" * 40, "n" * 40


@pytest.fixture
def started(tmp_path: Path) -> Any:
    """A daemon that reads its limits, secrets and level from a file, not from the environment."""
    made: list[Reloaded] = []

    def start(text: str) -> Reloaded:
        made.append(Reloaded(tmp_path, text))
        made[-1].start()
        return made[-1]

    yield start
    for daemon in made:
        daemon.close()


class Reloaded(Daemon):
    def __init__(self, directory: Path, text: str) -> None:
        super().__init__(directory)
        del self.environ["CHATD_API__INTERNAL_TOKEN"]
        self.write(text)

    def write(self, text: str) -> None:
        (self.directory / "chatd.toml").write_text(text)

    def lines(self, event: str) -> list[dict[str, Any]]:
        return [line for one in self.log.splitlines() if (line := json.loads(one))["event"] == event]

    def reload(self, text: str, becomes: str = "reloaded") -> dict[str, Any]:
        """The line that says what became of it."""
        before = len(self.lines(becomes))
        self.write(text)
        self.signal(signal.SIGHUP)
        wait_for(lambda: len(self.lines(becomes)) > before)
        return self.lines(becomes)[-1]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def config(secret: str, previous: str = "", *, token: str = "one", old_token: str = "", rest: str = "") -> str:
    return f"""
[api]
internal_token = "{token}"
previous_internal_token = "{old_token}"
[auth]
secret = "{secret}"
previous_secret = "{previous}"
{rest}
"""


async def test_tokens_and_keys_are_rotated_without_a_restart(started: Callable[[str], Reloaded]) -> None:
    daemon = started(config(OLD))
    daemon.token = "one"
    old, new = Tokens(OLD).issue(1, 600), Tokens(NEW).issue(2, 600)
    async with login(daemon, 1) as here:
        line = await trio.to_thread.run_sync(
            daemon.reload, config(NEW, OLD, token="two", old_token="one", rest="[limits]\ncontent_chars = 5")
        )
        assert sorted(line["changed"]) == [
            *("api.internal_token", "api.previous_internal_token", "auth.previous_secret", "auth.secret"),
            "limits.content_chars",
        ]
        for token in ("one", "two"):
            daemon.token = token
            assert daemon.request("GET", "/api/ws/users/1").status == 200
        assert daemon.request("POST", "/api/ws/messages", message(1, "123456")).status == 422
        async with login(daemon, 1, token=old), login(daemon, 2, token=new):
            pass
        await trio.to_thread.run_sync(daemon.reload, config(NEW, token="two"))
        assert daemon.request("POST", "/api/ws/messages", message(1, "123456")).status == 200
        daemon.token = "one"
        assert daemon.request("GET", "/api/ws/users/1").status == 401
        assert await refusal(daemon, old) == 4500
        # Who was here all the time has noticed nothing of all this.
        await here.send("ping", ref=1)
        assert (await here.expect("pong"))["ref"] == 1


async def refusal(daemon: Daemon, token: str) -> int:
    """The code that a login is closed with."""
    async with connect(daemon.ws_url) as client:
        await client.send("auth", ref=1, token=token)
        return (await client.closed())[0]


def message(user_id: int, content: str) -> dict[str, Any]:
    return {"conversation_id": 1, "sender_id": user_id, "content": content}


async def test_a_broken_file_changes_nothing(started: Callable[[str], Reloaded]) -> None:
    daemon = started(config(OLD))
    daemon.token = "one"
    broken = config(NEW, token="two", rest='[limits]\ncontent_chars = "many"\n[hub]\nport = 1')
    line = await trio.to_thread.run_sync(daemon.reload, broken, "reload_refused")
    assert [mistake.partition(":")[0] for mistake in line["mistakes"]] == ["hub.port", "limits.content_chars"]
    assert daemon.request("GET", "/api/ws/users/1").status == 200
    assert b"chatd_config_last_reload_success 0.0" in daemon.get("/metrics").body
    # Well formed, and yet: its key file is none. Nothing of the rest counts either.
    keys = 'algorithms = ["RS256"]\nkey_files = ["none.pem"]'
    line = await trio.to_thread.run_sync(daemon.reload, config(NEW, token="two", rest=keys), "reload_refused")
    assert line["mistakes"] == ["auth.key_files: none.pem: No such file or directory."]
    assert daemon.request("GET", "/api/ws/users/1").status == 200
    await trio.to_thread.run_sync(daemon.reload, config(OLD))
    assert b"chatd_config_last_reload_success 1.0" in daemon.get("/metrics").body


async def test_limits_origins_and_the_level_change(started: Callable[[str], Reloaded]) -> None:
    daemon = started(config(OLD))
    daemon.token = "one"
    async with login(daemon, 1) as one, login(daemon, 1) as other, awake(one, other):
        rest = '[hub]\norigins = ["https://a.example"]\n[limits]\nconnections_per_user = 2'
        await trio.to_thread.run_sync(daemon.reload, config(OLD, rest=rest))
        assert await refusal(daemon, await trio.to_thread.run_sync(daemon.token_for, 1)) == 4504
        assert await refused(daemon, [(b"Origin", b"http://127.0.0.1")]) == 403
        async with connect(daemon.ws_url, extra_headers=[(b"Origin", b"https://a.example")]):
            pass
    await trio.to_thread.run_sync(daemon.reload, config(OLD, rest='[logs]\nlevel = "error"'))
    before = len(daemon.log)
    assert await trio.to_thread.run_sync(daemon.stop) == 0
    assert len(daemon.log) == before, "below the level nothing is said"


def test_what_needs_a_restart_is_named_and_not_taken() -> None:
    old = Config()
    new = Config(
        hub=Hub(bind="[::1]:1", origins=["https://a"]),
        redis=Redis(url="redis://x"),
        limits=Limits(connections=3),
    )
    merged, changed, restart = merge(old, new)
    assert (changed, restart) == (["hub.origins", "limits.connections"], ["hub.bind", "redis.url"])
    assert merged == Config(hub=Hub(origins=["https://a"]), limits=Limits(connections=3))


def test_followers_hear_of_each_change() -> None:
    settings, heard = Settings(Config()), []
    settings.follow(lambda config: heard.append(config.limits.connections))
    settings.change(Config(limits=Limits(connections=7)))
    assert heard == [0, 7]
    assert settings.now.limits.connections == 7


@pytest.mark.parametrize("text", ["x = " + "[" * 3000, "x = " + "1" * 5000], ids=["nested", "digits"])
async def test_nothing_that_a_file_can_hold_ends_the_daemon(
    started: Callable[[str], Reloaded], text: str
) -> None:
    daemon = started(config(OLD))
    daemon.token = "one"
    await trio.to_thread.run_sync(daemon.reload, text, "reload_refused")
    assert daemon.request("GET", "/api/ws/users/1").status == 200


async def test_a_key_that_is_replaced_in_its_file_is_taken(
    tmp_path: Path, started: Callable[[str], Reloaded]
) -> None:
    """Its path has not changed: this is how a key that was stolen goes."""
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    tokens = [jwt.encode({"sub": "1", "exp": time.time() + 600}, key, algorithm="ES256") for key in keys]
    file = tmp_path / "key.pem"

    def put(key: ec.EllipticCurvePrivateKey) -> None:
        file.write_bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))

    text = config("", rest=f'algorithms = ["ES256"]\nkey_files = ["{file}"]')
    put(keys[0])
    daemon = started(text)
    async with login(daemon, 1, token=tokens[0]):
        pass
    put(keys[1])
    await trio.to_thread.run_sync(daemon.reload, text)
    async with login(daemon, 1, token=tokens[1]):
        pass
    assert await refusal(daemon, tokens[0]) == 4500
