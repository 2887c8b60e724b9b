"""`healthcheck`, `send`, `tail`: what an operator types, against a real daemon."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest

from tests.conftest import Daemons
from tests.daemon import Daemon

HEAVY = ["trio", "sqlalchemy", "alembic", "jwt", "httpx", "redis", "quart", "structlog"]


def test_healthcheck_tells_well_from_stopped(daemons: Daemons) -> None:
    daemon = daemons()
    well = daemon.command("healthcheck", "--ready")
    assert (well.returncode, well.stdout) == (0, f"{daemon.url}: ok (200)\n")
    daemon.kill()
    gone = daemon.command("healthcheck")
    assert gone.returncode == 1
    assert gone.stdout == f"{daemon.url} does not answer: Connection refused.\n"
    assert not gone.stderr


def test_healthcheck_reaches_a_daemon_that_listens_everywhere(daemon: Daemon) -> None:
    everywhere = {"CHATD_API__BIND": f"0.0.0.0:{daemon.api_port}"}
    asked = subprocess.run([*daemon.program(), "healthcheck"], env=daemon.environ | everywhere)
    assert asked.returncode == 0


@pytest.mark.service
def test_healthcheck_starts_fast() -> None:
    """A probe runs every few seconds: it imports no library that takes long."""
    look = "import sys, click\ntry: from chatd.cli import main; main(['healthcheck', '--help'])\n"
    look += f"except SystemExit: print('imported:', *[name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "imported:", ran.stdout


def test_send_posts_and_says_where_it_went(daemon: Daemon, conversation: int) -> None:
    posted = daemon.command("send", str(conversation), "Hello", "--user", "5")
    assert posted.returncode == 0, posted.stderr
    (message,) = daemon.get(f"/api/ws/conversations/{conversation}/messages").json["messages"]
    assert posted.stdout == f"id {message['id']} seq 1\n"
    assert (message["user_id"], message["content"]) == (5, "Hello")
    piped = run(daemon, "send", str(conversation), "-", "--user", "5", input="two\nlines\n")
    assert piped.stdout.endswith("seq 2\n"), piped
    assert (
        daemon.get(f"/api/ws/conversations/{conversation}/messages").json["messages"][1]["content"]
        == "two\nlines"
    )


def test_send_says_in_a_sentence_why_not(daemon: Daemon, conversation: int) -> None:
    empty = daemon.command("send", str(conversation), "", "--user", "5")
    assert (empty.returncode, empty.stdout) == (1, "")
    assert empty.stderr.startswith("Not posted: ")
    wrong = run(daemon, "send", "1", "x", "--user", "5", CHATD_API__INTERNAL_TOKEN="other")
    assert (wrong.returncode, "api.internal_token" in wrong.stderr) == (1, True)
    nowhere = daemon.command("send", "1", "x", "--user", "5", "--url", "http://127.0.0.1:1")
    assert nowhere.returncode == 75
    assert nowhere.stderr == "http://127.0.0.1:1 does not answer: Connection refused.\n"
    assert daemon.command("send", "1", "x", "--user", "5", "--url", "://").stderr.count("\n") == 1


def test_tail_shows_what_was_and_what_comes_and_ends_quietly(daemon: Daemon, conversation: int) -> None:
    for text in ("one", "two", "three"):
        daemon.post(conversation, 5, text)
    with Tail(daemon, conversation, "--since", "2") as tail:
        assert [tail.line()[10:] for _ in range(2)] == ["5: two", "5: three"]
        fourth = daemon.post(conversation, 6, "four")
        assert tail.line()[10:] == "6: four"
        daemon.request("PATCH", f"/api/ws/messages/{fourth['id']}", {"content": "4"})
        assert tail.line().endswith(f"message {fourth['id']} of 6 is now: 4")
        daemon.request("DELETE", f"/api/ws/messages/{fourth['id']}")
        assert tail.line().endswith("was deleted")
        assert tail.end() == (0, "")


def test_tail_sends_no_control_character_to_the_terminal(daemon: Daemon, conversation: int) -> None:
    evil = "\x1b]0;title\x07\x1b[2J\x9b31m\u202egnp.exe\r\n12:00:00  7: forged\x7f 👩‍💻 è"
    with Tail(daemon, conversation) as tail, Tail(daemon, conversation, "--json") as machine:
        daemon.post(conversation, 5, evil)
        shown = tail.line() + "\n" + tail.line()
        assert shown[10:] == (
            "5: \\x1b]0;title\\x07\\x1b[2J\\x9b31m\\u202egnp.exe\n    12:00:00  7: forged\\x7f 👩‍💻 è"
        )
        line = machine.line()
        assert json.loads(line)["content"] == evil
        assert line.isascii() and line.isprintable()


def test_tail_resumes_over_a_restart_and_says_so(daemons: Daemons) -> None:
    daemon = daemons()
    with Tail(daemon, 1) as tail:
        daemon.post(1, 5, "before")
        assert tail.line().endswith("before")
        daemon.stop()
        daemon.start()
        daemon.post(1, 5, "between, or after")
        assert tail.line().endswith("between, or after")
        code, said = tail.end()
    assert code == 0
    assert [sentence.split()[0] for sentence in said.splitlines()] == ["Connecting", "Connected"]


def test_tail_as_a_user_sees_what_that_user_may(daemons: Daemons) -> None:
    daemon = daemons(rooms__access="members")
    daemon.post(1, 5, "for members")
    stranger = daemon.command("tail", "1", "--user", "6")
    assert (stranger.returncode, stranger.stdout) == (1, "")
    assert stranger.stderr.startswith("Room 1 cannot be followed: ")
    with Tail(daemon, 1, "--user", "5", "--since", "1") as tail:
        assert tail.line().endswith("for members")
    with Tail(daemon, 1, "--since", "1") as tail:
        assert tail.line().endswith("for members")
    assert [member["user_id"] for member in daemon.get("/api/ws/conversations/1").json["members"]] == [5]


def run(daemon: Daemon, *arguments: str, input: str = "", **environ: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*daemon.program(), *arguments],
        cwd=daemon.directory,
        env=daemon.environ | environ,
        input=input,
        capture_output=True,
        text=True,
        timeout=30,
    )


class Tail:
    """`chatd tail` that runs, and is in its room."""

    def __init__(self, daemon: Daemon, room: int, *options: str) -> None:
        self._process = subprocess.Popen(
            [*daemon.program(), "tail", str(room), *options],
            cwd=daemon.directory,
            env=daemon.environ,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert self._process.stdout is not None
        self._output = self._process.stdout.fileno()
        self._daemon, self._room = daemon, room
        self._read = b""

    def __enter__(self) -> Tail:
        # Whoever is in the room hears an application's own event: the first one heard says that it is in.
        deadline = time.monotonic() + 15
        path = f"/api/ws/conversations/{self._room}/events"
        while b"come.in" not in self._read:
            assert time.monotonic() < deadline, self._read
            self._daemon.request("POST", path, {"event": "come.in"})
            if select.select([self._output], [], [], 0.1)[0]:
                self._read += os.read(self._output, 65536)
        return self

    def line(self) -> str:
        """The next one, without those of `come.in`."""
        deadline = time.monotonic() + 15
        while True:
            line, end, rest = self._read.partition(b"\n")
            if end:
                self._read = rest
                if b"come.in" not in line:
                    return line.decode()
                continue
            assert select.select([self._output], [], [], deadline - time.monotonic())[0], "no line came"
            more = os.read(self._output, 65536)
            assert more, self._process.stderr and self._process.stderr.read()
            self._read += more

    def end(self) -> tuple[int, str]:
        """Ctrl-C: its exit code, and what it said beside."""
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=15)
        return self._process.returncode, said.decode()

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with suppress(ValueError):  # `end` has closed its pipes
            self._process.communicate()
