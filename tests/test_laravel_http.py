"""What a backend in PHP sends over HTTP, judged as Laravel would judge it. docs/laravel.md has the table."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sqlite3
import subprocess
import time
from contextlib import closing
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode

import jwt
import pytest
import trio

from tests.client import connect, login
from tests.conftest import Daemons
from tests.daemon import TOKEN, Answer, Daemon
from tests.services import RedisServer, free_port
from tools.reference import ROOT

MESSAGES = "/api/ws/messages"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
UUID, ULID = "0190d1a2-7f3b-7c4d-8e5f-123456789abc", "01J3GT4ZVV9X8Y7W6V5T4S3R2Q"


def history(daemon: Daemon, conversation: int) -> list[dict[str, Any]]:
    return list(daemon.get(f"/api/ws/conversations/{conversation}/messages").json["messages"])


def post(daemon: Daemon, conversation: Any, content: Any = "Hello", **more: Any) -> Answer:
    body = {"conversation_id": conversation, "sender_id": 1, "content": content} | more
    return daemon.request("POST", MESSAGES, body)


def refused(answer: Answer, *fields: str) -> None:
    """A failed validation of these fields."""
    assert (answer.status, list(answer.json["errors"])) == (422, list(fields)), answer.body


# Ids.


@pytest.mark.parametrize("form", ["{}", " {} ", "{}\n", "+{}"])
def test_an_id_may_be_text(daemon: Daemon, conversation: int, form: str) -> None:
    id, user = form.format(conversation), form.format(1)
    stored = daemon.request("POST", MESSAGES, {"conversation_id": id, "sender_id": user, "content": "Hello"})
    assert stored.status == 200, stored.body
    reply = post(daemon, id, reply_to=form.format(stored.json["id"]))
    assert (reply.status, history(daemon, conversation)[1]["reply_to"]) == (200, stored.json["id"])
    batch = {"messages": [{"conversation_id": id, "sender_id": user, "content": "in a batch"}]}
    assert daemon.request("POST", f"{MESSAGES}/batch", batch).json["results"][0]["seq"] == 3
    place = f"/api/ws/conversations/{quote(id)}"
    assert daemon.get(f"{place}/messages?after={quote(form.format(stored.json['id']))}&limit=%201").json[
        "messages"
    ]
    assert daemon.request("PUT", f"{place}/members/{quote(form.format(5))}").status == 200
    assert daemon.get(f"/api/ws/users/{quote(form.format(5))}").json["user_id"] == 5
    token = {"user_id": form.format(5), "ttl": "60", "conversations": [id]}
    assert daemon.request("POST", "/api/ws/tokens", token).json["expires_in"] == 60
    event = {"event": "greeting", "user_ids": [form.format(5), 6]}
    assert daemon.request("POST", f"{place}/events", event).status == 200
    path = f"{MESSAGES}/{quote(form.format(stored.json['id']))}"
    assert daemon.request("PATCH", path, {"content": "Hello!"}).status == 200
    assert daemon.get(f"{path}/delivery").status == 200
    assert daemon.request("DELETE", path).status == 200


@pytest.mark.parametrize(
    "wrong", [0, -1, 2**53, True, 1.0, "0", "01", "1.0", "1 2", "0x1", "eins", "²", "9" * 50, None]
)
def test_what_is_no_id_is_refused(daemon: Daemon, wrong: Any) -> None:
    refused(post(daemon, wrong), "conversation_id")


@pytest.mark.parametrize(
    ("id", "noun"), [(UUID, "a UUID"), (UUID.replace("-", ""), "a UUID"), (ULID, "a ULID")]
)
def test_an_id_that_is_no_integer_is_called_what_it_is(
    daemon: Daemon, conversation: int, id: str, noun: str
) -> None:
    answer = daemon.request(
        "POST", MESSAGES, {"conversation_id": conversation, "sender_id": id, "content": "x"}
    )
    refused(answer, "sender_id")
    assert answer.json["message"] == f"The sender_id field must be an integer, not {noun}."
    answer = daemon.request("PUT", f"/api/ws/conversations/{id}/members/5")
    refused(answer, "conversation_id")
    assert answer.json["message"] == f"The conversation_id must be an integer, not {noun}."


# What PHP's arrays, empty text and numbers become.


@pytest.mark.parametrize("body", [b"[]", b" [ ] ", b"{}", b""])
def test_an_empty_array_is_an_empty_body(daemon: Daemon, conversation: int, body: bytes) -> None:
    place = f"/api/ws/conversations/{conversation}/members/5"
    for method, path in (
        ("PUT", place),
        ("DELETE", place),
        ("POST", "/api/ws/users/5/disconnect"),
        ("POST", "/api/ws/users/5/revoke"),
        ("PUT", "/api/ws/users/6/ban"),
    ):
        answer = daemon.request(method, path, body)
        assert answer.status == 200, (method, path, answer.body)
    refused(daemon.request("POST", MESSAGES, body or b"{}"), "conversation_id", "sender_id", "content")


def test_meta_is_passed_on_as_it_was_sent(daemon: Daemon, conversation: int) -> None:
    for meta in ([], {}, [1], {"a": []}):
        assert post(daemon, conversation, meta=meta).status == 200
    assert [one["meta"] for one in history(daemon, conversation)] == [[], {}, [1], {"a": []}]


def test_a_list_with_gaps_is_a_list(daemon: Daemon, conversation: int) -> None:
    """What array_filter leaves of a list."""
    event = {"event": "greeting", "user_ids": {"0": 5, "3": "6"}}
    assert daemon.request("POST", f"/api/ws/conversations/{conversation}/events", event).status == 200
    refused(
        daemon.request("POST", f"/api/ws/conversations/{conversation}/events", event | {"user_ids": {"a": 5}}),
        "user_ids",
    )


def test_empty_text_for_what_may_be_left_out_is_null(daemon: Daemon, conversation: int) -> None:
    empty = {"client_id": "", "type": " ", "reply_to": ""}
    assert post(daemon, conversation, **empty).status == 200
    (message,) = history(daemon, conversation)
    assert (message["client_id"], message["type"], message.get("reply_to")) == (None, "text", None)
    place = f"/api/ws/conversations/{conversation}"
    assert daemon.get(f"{place}/messages?before=&after=&limit=").json["messages"] == [message]
    assert daemon.request("PUT", f"{place}/members/5", {"role": "", "muted_until": ""}).status == 200
    assert (
        daemon.request("POST", "/api/ws/tokens", {"user_id": 5, "ttl": "", "conversations": ""}).status == 200
    )
    refused(daemon.request("PATCH", f"{MESSAGES}/{message['id']}", {"content": "", "meta": {}}), "content")


def test_a_client_id_may_be_a_number(daemon: Daemon, conversation: int) -> None:
    first, again = (post(daemon, conversation, client_id=id).json for id in (17, "17"))
    assert (again["id"], again["duplicate"]) == (first["id"], True)


def test_a_moment_may_be_unix_seconds(daemon: Daemon, conversation: int) -> None:
    place = f"/api/ws/conversations/{conversation}"
    assert daemon.request("PUT", f"{place}/members/5", {"muted_until": 4102444800}).status == 200
    (member,) = daemon.get(place).json["members"]
    assert member["muted_until"] == "2100-01-01T00:00:00.000000Z"
    assert daemon.request("PUT", "/api/ws/users/6/ban", {"until": 4102444800.5}).status == 200
    for wrong in (1e300, -1e18):
        refused(daemon.request("PUT", "/api/ws/users/6/ban", {"until": wrong}), "until")


# Content.


@pytest.mark.parametrize("content", ["", " ", "\n\t ", "\u00a0\u2003"])
def test_content_of_spaces_is_empty(daemon: Daemon, conversation: int, content: str) -> None:
    refused(post(daemon, conversation, content), "content")
    refused(post(daemon, "x", content), "conversation_id", "content")
    batch = {"messages": [{"conversation_id": conversation, "sender_id": 1, "content": content}]}
    (result,) = daemon.request("POST", f"{MESSAGES}/batch", batch).json["results"]
    assert list(result["errors"]) == ["content"]
    id = post(daemon, conversation, "  hi \n").json["id"]
    refused(daemon.request("PATCH", f"{MESSAGES}/{id}", {"content": content}), "content")
    (message,) = history(daemon, conversation)
    assert message["content"] == "  hi \n", "nobody's text is changed"


def test_content_that_is_too_long_is_a_failed_validation(daemon: Daemon, conversation: int) -> None:
    answer = post(daemon, conversation, "x" * 8001)
    refused(answer, "content")
    assert answer.json["code"] == "too_large"
    assert answer.json["errors"]["content"] == ["The content has 8001 characters; 8000 are allowed."]
    refused(post(daemon, conversation, meta={"a": "x" * 9000}), "meta")
    event = {"event": "greeting", "data": "x" * 70_000}
    refused(daemon.request("POST", f"/api/ws/conversations/{conversation}/events", event), "data")
    assert post(daemon, conversation, "x" * 300_000).status == 413


# The answer.


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"conversation_id": 1, "sender_id": 1}, "The content field is required."),
        ({"conversation_id": 1}, "The sender_id field is required. (and 1 more error)"),
        ({}, "The conversation_id field is required. (and 2 more errors)"),
    ],
)
def test_the_message_counts_the_other_errors(daemon: Daemon, body: Any, message: str) -> None:
    assert daemon.request("POST", MESSAGES, body).json["message"] == message


def test_a_slash_behind_the_path_is_the_same_route(daemon: Daemon, conversation: int) -> None:
    body = {"conversation_id": conversation, "sender_id": 1, "content": "Hello"}
    assert daemon.request("POST", f"{MESSAGES}/", body).status == 200
    many = {"messages": [body | {"content": "x" * 1000}] * 300}
    assert len(daemon.request("POST", f"{MESSAGES}/batch/", many).json["results"]) == 300
    assert daemon.get(f"/api/ws/conversations/{conversation}/").json["seq"] == 301


# Removal.


def state_of(daemon: Daemon, conversation: int, user: int) -> str:
    """From the database: over HTTP nobody is told who is banned."""
    with closing(sqlite3.connect(f"file:{daemon.directory}/chatd.db?mode=ro", uri=True)) as database:
        where = "conversation_id = ? AND user_id = ?"
        (row,) = database.execute(f"SELECT state FROM chat_members WHERE {where}", (conversation, user))
    return str(row[0])


@pytest.mark.parametrize(
    ("query", "body", "state"),
    [
        ("?ban=1", None, "banned"),
        ("", {"ban": True}, "banned"),
        ("", {"ban": 1}, "banned"),
        ("", {"ban": "true"}, "banned"),
        ("", [], "removed"),
        ("?ban=", {"ban": None}, "removed"),
        ("?ban=0", {"ban": "0"}, "removed"),
    ],
)
def test_a_ban_is_taken_from_the_query_and_the_body(
    daemon: Daemon, conversation: int, query: str, body: Any, state: str
) -> None:
    place = f"/api/ws/conversations/{conversation}/members/5"
    daemon.request("PUT", place)
    assert daemon.request("DELETE", place + query, body).status == 200
    assert state_of(daemon, conversation, 5) == state


# Forms.


def form(daemon: Daemon, text: str) -> Answer:
    return daemon.request("POST", MESSAGES, text.encode(), FORM)


def test_a_form_is_a_message(daemon: Daemon, conversation: int) -> None:
    fields = {
        "conversation_id": conversation,
        "sender_id": " 1 ",
        "content": "Grüße & more",
        "type": "",
        "meta[key]": "value",
        "meta[tags][0]": "a",
        "meta[tags][1]": "b",
        "meta[deep][er]": "",
    }
    answer = form(daemon, urlencode(fields))
    assert (answer.status, answer.json["seq"]) == (200, 1), answer.body
    (message,) = history(daemon, conversation)
    assert (message["user_id"], message["type"], message["content"]) == (1, "text", "Grüße & more")
    assert message["meta"] == {"key": "value", "tags": ["a", "b"], "deep": {"er": None}}
    answer = form(daemon, f"conversation_id={conversation}&sender_id=1&content=x&meta[]=a&meta[]=b&meta[7]=c")
    assert history(daemon, conversation)[1]["meta"] == {"0": "a", "1": "b", "7": "c"}


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("content=x", 422),
        ("", 422),
        ('{"conversation_id": 1,', 400),
        ("conversation_id=1&sender_id=1&content=%ff", 422),
        ("conversation_id=1&sender_id=1&content=x&meta" + "[a]" * 40 + "=1", 422),
        ("&".join(f"meta[{n}]=1" for n in range(1001)), 422),
        ("conversation_id[a]=1&sender_id=1&content=x", 422),
        ("conversation_id=1&sender_id=1&content[]=x", 422),
    ],
)
def test_a_form_that_is_wrong(daemon: Daemon, text: str, status: int) -> None:
    answer = form(daemon, text)
    assert (answer.status, answer.json["code"]) == (status, "bad_request"), answer.body


# What differs from Laravel on purpose.

GOOD = b'{"conversation_id":1,"sender_id":1,"content":"Gr\xc3\xbc\xc3\x9fe"}'


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (GOOD, "text/plain", 200),
        (GOOD.decode().encode("latin-1"), "application/json", 400),
        (b"\xef\xbb\xbf" + GOOD, "application/json", 400),
        (GOOD.replace(b"\xc3\xbc", b"\\ud83d"), "application/json", 400),
        (GOOD.replace(b"\xc3\xbc", b"\\u0000"), "application/json", 422),
        (b"", "application/json", 400),
        (b'--x\r\nContent-Disposition: form-data; name="content"\r\n\r\nHello\r\n--x--\r\n',
         "multipart/form-data; boundary=x", 400),
    ],
)  # fmt: skip
def test_a_body_that_laravel_would_take_otherwise(
    daemon: Daemon, body: bytes, content_type: str, status: int
) -> None:
    answer = daemon.request("POST", MESSAGES, body, {"Content-Type": content_type})
    assert answer.status == status, answer.body


# The guide, as PHP runs it.

PHP = shutil.which("php") or "php"
LARAVEL = ROOT / "tests/php/laravel.php"


def guide(page: str, number: int = 0) -> str:
    """A block of PHP in the documentation."""
    return re.findall(r"```php\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)[number]


def php(daemon: Daemon, program: str, **environ: str) -> str:
    environ = {"CHATD_URL": daemon.url, "CHATD_INTERNAL_TOKEN": daemon.token} | environ
    script = f"require '{LARAVEL}';\n{program}"
    ended = subprocess.run(  # -n: without extensions, one of which may have a class Redis
        [PHP, "-n", "-r", script], capture_output=True, text=True, timeout=60, env=os.environ | environ
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended
    return ended.stdout


def things(conversation: int, *, quoted: bool = False) -> str:
    """What an application has, before the guide begins. A database may give ids as text."""
    id, user = (f"'{conversation}'", "'7'") if quoted else (conversation, 7)
    return f"""
    $conversation = (object) ['id' => {id}];
    $user = (object) ['id' => {user}];
    $job = new class {{ function uuid() {{ return 'job-1'; }} }};
    """


@pytest.mark.parametrize("quoted", [False, True])
def test_the_guide_runs_in_php(daemons: Daemons, own_redis: RedisServer, quoted: bool) -> None:
    daemon = daemons(redis__url=own_redis.url)
    program = (
        things(3, quoted=quoted)
        + guide("laravel.md")
        + """
    $token = Route::$routes['GET /chat/token'](new Request([], [], $user))->body();
    echo json_encode(['message' => $message, 'token' => $token]);
    """
    )
    said = json.loads(php(daemon, program, REDIS_ADDRESS=f"127.0.0.1:{own_redis.port}"))
    assert (said["message"]["status"], said["message"]["seq"]) == ("ok", 1)
    claims = jwt.decode(said["token"], options={"verify_signature": False})
    assert claims["sub"] == "7"
    deadline = time.monotonic() + 20
    while len(history(daemon, 3)) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    messages = history(daemon, 3)
    assert [one["client_id"] for one in messages] == ["job-1", "job-1-redis"]
    assert state_of(daemon, 3, 7) == "banned"


def test_the_guides_client_keeps_no_header_for_the_next_call(daemon: Daemon, conversation: int) -> None:
    setup = things(conversation) + guide("laravel.md").partition("// Or post through Redis")[0]
    more = """
    $hello = ['conversation_id' => $conversation->id, 'sender_id' => $user->id, 'content' => 'Hello'];
    $again = Http::chatd()->post('/api/ws/messages', $hello)->json();
    $kept = Http::chatd();
    $kept->withHeaders(['Idempotency-Key' => 'k'])->post('/api/ws/messages', $hello);
    $lost = $kept->post('/api/ws/messages', $hello)->json();
    echo json_encode(['again' => $again, 'lost' => $lost]);
    """
    said = json.loads(php(daemon, setup + more))
    assert ("duplicate" in said["again"], said["again"]["seq"]) == (False, 2)
    assert said["lost"]["duplicate"] is True, "what the guide warns of, and the reason for a macro"


def test_php_sends_an_empty_array_as_a_list(daemon: Daemon, conversation: int) -> None:
    program = (
        things(conversation)
        + guide("laravel.md").partition("// Post a message")[0]
        + """
    $place = "/api/ws/conversations/{$conversation->id}/members/{$user->id}";
    foreach (['put' => $place, 'post' => "/api/ws/users/{$user->id}/disconnect"] as $method => $path) {
        echo Http::chatd()->$method($path)->status(), ' ';
    }
    echo Http::chatd()->post("/api/ws/users/{$user->id}/revoke", [])->status(), ' ';
    $form = http_build_query(['conversation_id' => $conversation->id, 'sender_id' => '7', 'content' => 'Hello',
        'meta' => ['key' => 'value', 'tags' => ['a', 'b'], 'yes' => true, 'none' => null]]);
    $token = config('services.chatd.token');
    $headers = ['Content-Type: application/x-www-form-urlencoded', "X-Internal-Token: $token"];
    $http = ['method' => 'POST', 'header' => $headers, 'content' => $form];
    $url = config('services.chatd.url').'/api/ws/messages';
    echo file_get_contents($url, false, stream_context_create(['http' => $http]));
    """
    )
    said = php(daemon, program)
    assert said.startswith('200 200 200 {"id":'), said
    (message,) = history(daemon, conversation)
    assert message["meta"] == {"key": "value", "tags": ["a", "b"], "yes": "1"}


LOGIN = """
class PersonalAccessToken
{
    static function findToken($text) { return $text === 'opaque' ? (object) ['tokenable_id' => '7'] : null; }
}
%s
$headers = array_change_key_case(getallheaders());
$request = new Request($headers, json_decode(file_get_contents('php://input'), true));
header('Content-Type: application/json');
try {
    echo json_encode(['data' => Route::$routes['POST '.substr($_SERVER['REQUEST_URI'], 4)]($request)]);
} catch (Refused $refused) {
    http_response_code($refused->getCode());
}
"""


def test_a_login_is_judged_in_php(daemons: Daemons, tmp_path: Path) -> None:
    script, port = tmp_path / "auth.php", free_port()
    script.write_text(f"<?php require '{LARAVEL}';\n{LOGIN % guide('authentication.md')}")
    server = [PHP, "-n", "-S", f"127.0.0.1:{port}", str(script)]
    daemon = daemons(auth__backend_url=f"http://127.0.0.1:{port}/api/chat/auth")

    async def log_in() -> None:
        async with login(daemon, 7, token="opaque") as client:
            assert client.ready["user_id"] == 7  # type: ignore[attr-defined]
        async with connect(daemon.ws_url) as client:
            await client.expect("hello")
            assert (await client.request("auth", token="another"))["code"] == "unauthorized"

    with subprocess.Popen(server, env=os.environ | {"CHATD_INTERNAL_TOKEN": TOKEN}) as process:
        try:
            wait_until_open(port)
            trio.run(log_in)
        finally:
            process.terminate()


def wait_until_open(port: int) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.02)
