"""A real chatd in a process of its own, for tests: started, asked over HTTP, killed, started again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from tests.services import free_port

TOKEN = "a-token-for-tests"
START_SECONDS = 60
STOP_SECONDS = 20


class Answer:
    """An HTTP answer: `status`, `headers`, `json`."""

    def __init__(self, status: int, headers: Any, body: bytes) -> None:
        self.status, self.headers, self.body = status, headers, body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


class Ended(AssertionError):
    """chatd has ended with this `code` before it served."""

    def __init__(self, code: int, log: str) -> None:
        super().__init__(f"chatd ended with {code}:\n{log}")
        self.code = code


class Daemon:
    """`chatd serve` on ports of its own. `settings` are `section__key` names, as in the environment.

    `open_files` is the most that it may have open, if not as many as this process.
    """

    start_seconds, stop_seconds = START_SECONDS, STOP_SECONDS

    def __init__(self, directory: Path, *, demo: bool = False, open_files: int = 0, **settings: Any) -> None:
        self.directory = directory
        self._arguments = ["serve", "--demo"] if demo else ["serve"]
        self.api_port, self.hub_port = free_port(), free_port()
        self.token = "secret" if demo else TOKEN
        self.url = f"http://127.0.0.1:{self.api_port}"
        self.ws_url = f"ws://127.0.0.1:{self.hub_port}/ws"
        defaults = {
            "api__bind": f"127.0.0.1:{self.api_port}",
            "hub__bind": f"127.0.0.1:{self.hub_port}",
            "server__drain_window": 0.2,
            "logs__format": "json",
        }
        if not demo:
            defaults |= {"api__internal_token": TOKEN, "rooms__access": "open"}
        self.environ = {key: value for key, value in os.environ.items() if not key.startswith("CHATD_")}
        self.environ |= {f"CHATD_{key.upper()}": str(value) for key, value in (defaults | settings).items()}
        self.environ["PYTHONPATH"] = str(Path(__file__).parent.parent)
        self._prefix = ["prlimit", f"--nofile={open_files}:{open_files}"] if open_files else []
        self._inherited: list[int] = []  # descriptors beyond the usual three
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """None while it runs."""
        return None if self._process is None else self._process.poll()

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def program(self) -> list[str]:
        return [sys.executable, "-m", "chatd"]

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run another chatd command with the same configuration."""
        return subprocess.run(
            [*self.program(), *arguments],
            cwd=self.directory,
            env=self.environ,
            capture_output=True,
            text=True,
            timeout=60,
        )

    def start(self) -> Daemon:
        with (self.directory / "log").open("ab") as log:
            self._process = subprocess.Popen(
                [*self._prefix, *self.program(), *self._arguments],
                cwd=self.directory,
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=self._inherited,
            )
        deadline = time.monotonic() + self.start_seconds
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise Ended(self._process.returncode, self.log)
            try:
                if self.get("/healthz").status == 200:
                    return self
            except OSError:
                time.sleep(0.02)
        raise AssertionError(f"chatd did not start:\n{self.log}")

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        assert self._process is not None
        self._process.terminate()
        return self._process.wait(self.stop_seconds)

    def kill(self) -> None:
        assert self._process is not None
        self._process.kill()
        self._process.wait(self.stop_seconds)

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def wait(self) -> int:
        assert self._process is not None
        return self._process.wait(self.stop_seconds)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGCONT)
            self.kill()

    # HTTP, as a backend.

    def request(
        self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None
    ) -> Answer:
        data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        given = {"X-Internal-Token": self.token, "Content-Type": "application/json"} | (headers or {})
        request = urllib.request.Request(self.url + path, data, given, method=method)
        try:
            with urllib.request.urlopen(request, timeout=20) as response:
                return Answer(response.status, response.headers, response.read())
        except urllib.error.HTTPError as error:
            with error:
                return Answer(error.code, error.headers, error.read())

    def get(self, path: str) -> Answer:
        return self.request("GET", path)

    def post(self, conversation_id: int, sender_id: int, content: str, **fields: Any) -> dict[str, Any]:
        """Post a message; it must be accepted."""
        body = {"conversation_id": conversation_id, "sender_id": sender_id, "content": content} | fields
        answer = self.request("POST", "/api/ws/messages", body)
        assert answer.status == 200, (answer.status, answer.body)
        return dict(answer.json)

    def token_for(self, user_id: int, **fields: Any) -> str:
        answer = self.request("POST", "/api/ws/tokens", {"user_id": user_id} | fields)
        assert answer.status == 200, answer.body
        return str(answer.json["token"])
