"""PHP: the package in clients/php, and applications that move to chatd as docs/laravel.md says.

Debian's PHP, PHPUnit, Lumen, phpredis and Predis, and real services.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import textwrap
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.backend import Asked, Reply, serving
from tests.client import login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.services import RedisServer
from tests.test_snippets import LONG, STANDARD, deliveries
from tools.reference import ROOT

pytestmark = pytest.mark.service

PACKAGE = ROOT / "clients" / "php"
HANDLE = ROOT / "tests" / "laravel" / "handle.php"
TITLED = re.compile(r'^( *)```\w+ title="([^"]+)"\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
ADDRESSES = "http://127.0.0.1:8080", "redis://127.0.0.1:6379/0"  # in the documentation
PATIENCE = 120.0  # seconds: the machine may be busy
MODEL = """
namespace App\\Models;
class ChatMessage extends \\Illuminate\\Database\\Eloquent\\Model { protected $guarded = []; }
"""


def php(program: str, *given: Any) -> str:
    """What a program prints that has the package and `$given`."""
    start = f"require '{PACKAGE}/tests/bootstrap.php'; $given = json_decode(stream_get_contents(STDIN), true);"
    ended = subprocess.run(
        ["php", "-r", f"{start} {program}"],
        input=json.dumps(given),
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert ended.returncode == 0 and ended.stderr == "", ended
    return ended.stdout


class Application:
    """The Laravel application of docs/laravel.md: the blocks that have a title are its files."""

    def __init__(self, directory: Path, **environ: str) -> None:
        self.directory = directory
        self._environ = os.environ | environ
        page = (ROOT / "docs" / "laravel.md").read_text()
        self.files = {title: textwrap.dedent(text) for _, title, text in TITLED.findall(page)}
        for name, text in (self.files | {"app/Models/ChatMessage.php": MODEL}).items():
            file = directory / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"<?php\n{text}" if name.endswith(".php") else text)

    def request(
        self, method: str, path: str, body: Any = None, user: int = 0, headers: dict[str, str] | None = None
    ) -> tuple[int, str]:
        text = body if isinstance(body, str) else json.dumps(body)
        ended = subprocess.run(
            ["php", str(HANDLE), str(self.directory)],
            input=json.dumps([method, path, text, headers or {}, user]),
            capture_output=True,
            text=True,
            env=self._environ,
            timeout=PATIENCE,
        )
        assert ended.returncode == 0, ended
        status, content = json.loads(ended.stdout)
        return status, content

    async def asks(self, *arguments: Any, **options: Any) -> tuple[int, str]:
        return await trio.to_thread.run_sync(lambda: self.request(*arguments, **options))


# The package.


def test_the_package_passes_its_tests(daemons: Daemons) -> None:
    daemon = daemons(limits__sends_per_second=0)
    environ = os.environ | {"CHATD_URL": daemon.url, "CHATD_INTERNAL_TOKEN": daemon.token}
    ended = subprocess.run(["phpunit"], cwd=PACKAGE, env=environ, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert re.search(r"^OK \(\d\d tests", ended.stdout, re.MULTILINE), ended.stdout


async def test_chatd_takes_its_tokens(daemons: Daemons) -> None:
    daemon = daemons(auth__secret=LONG, auth__audience="chat", auth__issuer="shop", rooms__access="members")
    sign = "echo (new Chatd\\TokenSigner(...$given[0]))->sign(5, conversations: [3 => 1]);"
    token = php(sign, [LONG, "chat", "shop"])
    async with login(daemon, 5, {"1": None}, token=token) as ada:
        assert ada.ready["user_id"] == 5  # type: ignore[attr-defined]
        daemon.post(1, 7, "Hello")
        assert (await ada.messages(1))[0]["content"] == "Hello"


@pytest.mark.parametrize("secret", [LONG, STANDARD])
def test_it_knows_chatds_webhooks(secret: str) -> None:
    cases = [[headers, body.decode(), right] for headers, body, right in deliveries(secret).values()]
    program = """
    [$secret, $cases] = $given;
    foreach ($cases as [$headers, $body, $right]) {
        try {
            (new Chatd\\Webhook($secret))->verify($body, $headers);
            echo 1;
        } catch (Chatd\\Exceptions\\InvalidSignature) {
            echo 0;
        }
    }
    """
    assert php(program, secret, cases) == "".join(str(int(right)) for _, _, right in cases)


# Moving in.


@pytest.mark.parametrize("client", ["phpredis", "predis"])
@pytest.mark.parametrize(
    ("environ", "channel"),
    [
        ({"SKELETON": "new"}, "laravel-database-chat.messages"),
        ({"SKELETON": "old"}, "laravel_database_chat.messages"),
        ({"REDIS_PREFIX": "shop-database-"}, "shop-database-chat.messages"),
        ({"REDIS_PREFIX": ""}, "chat.messages"),
    ],
    ids=["hyphens", "underscores", "own", "none"],
)
async def test_an_application_that_keeps_its_table(
    client: str, environ: dict[str, str], channel: str, tmp_path: Path, own_redis: RedisServer
) -> None:
    """Only chatd.toml is new. Of a prefix of its own chatd has to be told."""
    environ = {"REDIS_PORT": str(own_redis.port), "REDIS_CLIENT": client} | environ
    application = Application(tmp_path / "shop", **environ)
    (tmp_path / "shop" / "routes" / "publish.php").write_text(
        "<?php Route::post('/messages', [App\\Http\\Controllers\\PublishController::class, 'store']);"
    )
    known: dict[str, Any] = {"redis__foreign_channels": channel} if channel.startswith("shop") else {}
    node = Daemon(tmp_path, auth__secret=LONG, **known)
    toml = application.files["chatd.toml"].replace(ADDRESSES[1], own_redis.url)
    (tmp_path / "chatd.toml").write_text(toml)
    try:
        node.start()
        status, token = await application.asks("GET", "/chat/token", user=7)
        assert status == 200
        async with login(node, 7, {"1": None}, token=token) as ada:
            posted = {"conversation_id": "1", "sender_id": 5, "content": "Chào 👍"}
            status, text = await application.asks("POST", "/messages", posted)
            assert (status, json.loads(text)) == (200, {"id": 1, "status": "ok"})
            heard = await ada.expect("message")
            assert (heard["conversation_id"], heard["content"], heard["id"]) == (1, "Chào 👍", 1)
            status, text = await application.asks("POST", "/messages", {"conversation_id": "one"})
            assert status == 422 and "conversation_id" in json.loads(text)["errors"]
    finally:
        node.close()


async def test_an_application_that_lets_chatd_store(daemons: Daemons, tmp_path: Path) -> None:
    application, told = Application(tmp_path), list[Reply]()

    def answer(asked: Asked) -> Reply:
        told.append(application.request("POST", asked.path, asked.body.decode(), headers=asked.headers))
        return told[-1]

    with serving() as backend:
        backend.answer = answer
        hooks: dict[str, Any] = {"webhooks__url": f"{backend.url}/api/chat/events", "webhooks__secret": LONG}
        daemon = daemons(auth__secret=LONG, rooms__access="members", **hooks)
        await let_chatd_store(application, daemon, told)


async def let_chatd_store(application: Application, daemon: Daemon, told: list[Reply]) -> None:
    env = application.directory / ".env"
    env.write_text(env.read_text().replace(ADDRESSES[0], daemon.url).replace("=secret\n", f"={daemon.token}\n"))
    messages = "/api/conversations/1/messages"
    (application.directory / "routes" / "rooms.php").write_text(
        "<?php foreach (['enter', 'leave'] as $name) "
        "Route::post($name, fn () => App\\Rooms::$name(1, app('auth')->user()->id));"
    )
    await application.asks("POST", "/enter", user=7)
    _, token = await application.asks("GET", "/chat/token", user=7)
    async with login(daemon, 7, {"1": 0}, token=token) as ada:
        hello, key = {"content": "Hello"}, {"Idempotency-Key": "k-1"}
        answers = [await application.asks("POST", messages, hello, 5, key) for _ in range(2)]
        assert answers[0] == answers[1] and answers[0][0] == 200, answers
        status, _ = await application.asks("POST", messages, hello, 5)
        assert status == 200
        heard = await ada.messages(2)
        assert [message["content"] for message in heard] == ["Hello", "Hello"], "one for each key"
        status, text = await application.asks("POST", messages, {"content": ""}, 5)
        assert status == 422 and "content" in text
        status, text = await application.asks("GET", f"{messages}?before={heard[1]['id']}", user=5)
        assert [message["seq"] for message in json.loads(text)["messages"]] == [1]
        await ada.request("send", conversation_id=1, content="Hi")
        await application.asks("POST", "/leave", user=7)
        await ada.expect("unsubscribed", conversation_id=1)
    with trio.fail_after(PATIENCE):
        while not told:
            await trio.sleep(0.1)
    assert told[0][0] == 200, told
    headers, body, _ = deliveries(LONG)["old"]
    status, _ = await application.asks("POST", "/api/chat/events", body.decode(), headers=headers)
    assert status == 403
