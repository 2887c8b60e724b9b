"""Every block of code in the documentation, by its language: it is run, or at least read by what would run it.

The tutorials run in test_tutorials, the examples of chatd.js in test_javascript, the bodies and answers of the
HTTP reference in test_docs.
"""

from __future__ import annotations

import base64
import configparser
import hmac
import json
import re
import shlex
import shutil
import subprocess
import time
import tomllib
from base64 import b64encode
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import click
import psycopg
import pytest

from chatd import config
from chatd.cli import main
from chatd.core import callbacks
from tests.conftest import Daemons
from tests.node import NODE, run_script
from tests.services import PostgresServer
from tools.reference import ROOT

BLOCK = re.compile(r'^( *)```(\w*)(?: title="([^"]*)")?\n(.*?)^\1```$', re.MULTILINE | re.DOTALL)
LONG = "0123456789abcdef0123456789abcdef"  # what an ellipsis stands for, in a secret


class Snippet(NamedTuple):
    place: str  # "backup.md:13"
    language: str
    title: str
    text: str


def snippets() -> Iterator[Snippet]:
    for path in sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md"), *ROOT.glob("clients/*/*.md")]):
        page = path.read_text()
        for found in BLOCK.finditer(page):
            indent, language, title, text = found.groups()
            line = page.count("\n", 0, found.start()) + 1
            yield Snippet(
                f"{path.name}:{line}", language, title or "", re.sub(f"^{indent}", "", text, flags=re.M)
            )


ALL = list(snippets())
TESTED_ELSEWHERE = {"text", "html"}  # shown, not run: formulas, output; the tutorials' page


def of(*languages: str) -> Any:
    found = [one for one in ALL if one.language in languages]
    return pytest.mark.parametrize("snippet", found, ids=[one.place for one in found])


def test_each_block_has_a_language_that_is_tested() -> None:
    known = {"json", "toml", "ini", "sh", "js", "python", "php", "sql"} | TESTED_ELSEWHERE
    assert [one for one in ALL if one.language not in known] == []
    assert len(ALL) > 80


@of("json")
def test_json_is_json(snippet: Snippet) -> None:
    """One value, or one a line."""
    try:
        json.loads(snippet.text)
    except json.JSONDecodeError:
        assert [json.loads(line) for line in snippet.text.splitlines()]


@of("toml")
def test_a_configuration_is_accepted(snippet: Snippet, tmp_path: Path) -> None:
    file = tmp_path / "chatd.toml"
    file.write_text(snippet.text.replace('"…"', f'"{LONG}"'))
    loaded = config.load(file, {"CHATD_API__INTERNAL_TOKEN": "t", "CHATD_WEBHOOKS__SECRET": LONG})
    for section, values in tomllib.loads(file.read_text()).items():
        for key, value in values.items():
            assert getattr(getattr(loaded, section), key) == value or key in ("internal_token", "secret")


@of("ini")
def test_a_drop_in_is_one(snippet: Snippet) -> None:
    unit = configparser.ConfigParser(strict=False)
    unit.read_string(snippet.text)
    assert set(unit.sections()) <= {"Service", "Socket", "Unit"}


# Shell.

TARGETS = set(re.findall(r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE))


@pytest.mark.service
@of("sh")
def test_a_shell_reads_it_and_its_commands_exist(snippet: Snippet, tmp_path: Path) -> None:
    subprocess.run(["sh", "-n"], input=snippet.text, text=True, check=True)
    for words in _commands(snippet.text.replace("/srv/backups", str(tmp_path))):
        if words[0].endswith("/chatd") or words[0] == "chatd":
            _parse(words[1:])
        elif words[0] == "make":
            named = [word for word in words[1:] if "=" not in word]
            assert set(named) <= TARGETS, words
        elif words[:2] == ["python", "-m"]:
            assert find_spec(words[2]), words


def _commands(text: str) -> Iterator[list[str]]:
    """Each simple command, without its assignments."""
    lines = text.replace("\\\n", " ").splitlines()
    for line in lines:
        lexer = shlex.shlex(line, posix=True, punctuation_chars="();<>|&")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, ";"]:
            if not set(word) <= set("();<>|&"):
                words.append(word)
                continue
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield words
            words = []


def _parse(words: list[str]) -> None:
    """As click would, without running anything: an option that is none, or a missing argument, is an error."""
    command: click.Command = main
    context = click.Context(main)
    words = list(words)
    while isinstance(command, click.Group):
        name, found, words = command.resolve_command(context, words)
        assert found is not None, name
        command, context = found, click.Context(found, info_name=name, parent=context)
    command.make_context(command.name, words)


@pytest.mark.parametrize("page", ["README.md", "docs/http.md", "docs/deployment.md"])
def test_what_is_posted_with_curl_is_stored(page: str, daemons: Daemons, tmp_path: Path) -> None:
    token = tmp_path / "token"
    daemon = daemons()
    token.write_text(daemon.token)
    text = "".join(
        one.text for one in ALL if one.language == "sh" and one.place.startswith(f"{Path(page).name}:")
    )
    posts = [
        line for line in text.replace("\\\n", " ").splitlines() if line.startswith("curl") and "-d" in line
    ]
    assert len(posts) == 1
    command = re.sub(r"http://(localhost|127\.0\.0\.1):8080", daemon.url, posts[0])
    command = command.replace("/etc/credstore/chatd.api.internal_token", str(token))
    command = command.replace("X-Internal-Token: secret", f"X-Internal-Token: {daemon.token}")
    ended = subprocess.run(
        ["sh", "-c", command],
        capture_output=True,
        text=True,
        timeout=30,
        env={"PATH": "/usr/bin:/bin", "CHATD_API__INTERNAL_TOKEN": daemon.token},
    )
    assert json.loads(ended.stdout)["status"] == "ok", ended
    assert daemon.get("/api/ws/conversations/1/messages").json["messages"][0]["content"] == "Hello"


# Programs.


@pytest.mark.service
@of("js")
def test_javascript_is_javascript(snippet: Snippet, tmp_path: Path) -> None:
    file = tmp_path / "snippet.mjs"
    file.write_text(snippet.text)
    subprocess.run([NODE, "--check", str(file)], check=True)


@of("python")
def test_python_is_python(snippet: Snippet) -> None:
    compile(snippet.text, snippet.place, "exec")


@pytest.mark.service
@of("php")
def test_php_is_php(snippet: Snippet, tmp_path: Path) -> None:
    file = tmp_path / "snippet.php"
    file.write_text(f"<?php\n{snippet.text}")
    assert PHP is not None, "apt-get install php-cli"
    subprocess.run([PHP, "--syntax-check", str(file)], check=True, capture_output=True)


PHP = shutil.which("php")
STANDARD = f"whsec_{b64encode(bytes(range(200, 232))).decode()}"
BODY = '{"event": "user.online", "name": "grüß dich"}'.encode()


def changed(headers: dict[str, str], **values: str) -> dict[str, str]:
    return headers | {f"webhook-{name}": value for name, value in values.items()}


def deliveries(secret: str) -> dict[str, tuple[dict[str, str], bytes, bool]]:
    """Headers and a body, and whether chatd has sent them."""
    now = int(time.time())
    sent = callbacks.headers(secret, "user.online", "7-ab", BODY)
    with mock.patch.object(callbacks.time, "time", return_value=now - 3600):
        old = callbacks.headers(secret, "user.online", "7-ab", BODY)
    return {
        "right": (sent, BODY, True),
        "among others": (changed(sent, signature=f"v1,x v1a,y {sent['webhook-signature']}"), BODY, True),
        "of another secret": (callbacks.headers("x" * 32, "user.online", "7-ab", BODY), BODY, False),
        "old": (old, BODY, False),
        "with another time": (changed(sent, timestamp=str(now + 1)), BODY, False),
        "with another id": (changed(sent, id="8-ab"), BODY, False),
        "with another body": (sent, BODY + b" ", False),
        "with no headers": ({}, BODY, False),
        "with a strange signature": (changed(sent, signature="v1,é v1, v1 é"), BODY, False),
    }


CASES = pytest.mark.parametrize(
    ("secret", "name"), [(secret, name) for secret in (LONG, STANDARD) for name in deliveries(secret)]
)


def the(language: str) -> str:
    (text,) = [one.text for one in ALL if one.language == language and one.place.startswith("webhooks.md")]
    return text


@CASES
def test_a_signature_is_checked_in_python(secret: str, name: str) -> None:
    headers, body, right = deliveries(secret)[name]
    names = {"request": SimpleNamespace(headers=headers, body=body), "SECRET": secret}
    names |= {"PermissionDenied": PermissionError, "base64": base64, "hmac": hmac, "time": time}
    if right:
        exec(the("python"), names)
    else:
        with pytest.raises(PermissionError):
            exec(the("python"), names)


@pytest.mark.service
@CASES
def test_a_signature_is_checked_in_php(secret: str, name: str) -> None:
    headers, body, right = deliveries(secret)[name]
    given = b64encode(json.dumps([headers, secret, body.decode()]).encode()).decode()
    program = f"""
    [$headers, $secret, $body] = json_decode(base64_decode('{given}'), true);
    $request = new class($headers, $body) {{
        function __construct(private $headers, private $body) {{}}
        function header($name, $default = null) {{ return $this->headers[$name] ?? $default; }}
        function getContent() {{ return $this->body; }}
    }};
    function config($key) {{ return $GLOBALS['secret']; }}
    function abort_unless($condition, $status) {{ if (!$condition) {{ echo $status; exit; }} }}
    {the("php")}
    echo 'fine';
    """
    assert PHP is not None, "apt-get install php-cli"
    ended = subprocess.run([PHP, "-r", program], capture_output=True, text=True, timeout=30)
    assert ended.stdout == ("fine" if right else "403"), ended


@pytest.mark.service
@CASES
def test_a_signature_is_checked_in_javascript(secret: str, name: str) -> None:
    headers, body, right = deliveries(secret)[name]
    given = f"{json.dumps(secret)}, {json.dumps(headers)}, Buffer.from({list(body)})"
    said = run_script(f"{the('js')}\nconsole.log(isFromChatd({given}));", 30)
    assert said.strip() == str(right).lower()


@pytest.mark.service
@of("sql")
def test_postgresql_takes_it(snippet: Snippet, tmp_path: Path) -> None:
    with PostgresServer(tmp_path) as server:
        with psycopg.connect(server.url, autocommit=True) as connection:
            for statement in re.sub(r"--.*", "", snippet.text).split(";"):
                if statement.strip():
                    connection.execute(statement.encode())
            deadline = time.monotonic() + 10
            while time.monotonic() < deadline:  # the server's processes read it one after the other
                (names,) = connection.execute("SHOW synchronous_standby_names").fetchone() or ("",)
                if names:
                    break
        assert names == "ANY 1 (db2, db3)"
