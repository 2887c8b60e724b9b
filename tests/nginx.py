"""The shipped docs/nginx-websocket.conf in a real nginx, without rights and on loopback ports."""

from __future__ import annotations

import shutil
import signal
import subprocess
import time
from pathlib import Path

from tests.services import free_port

SHIPPED = Path(__file__).parent.parent / "docs" / "nginx-websocket.conf"
NAME = "localhost"
START_SECONDS = 10

# What belongs into nginx.conf, beside the shipped file; paths that an unprivileged nginx can write.
FRAME = """
daemon off;
{user}
worker_processes 2;
worker_rlimit_nofile 20000;
worker_shutdown_timeout 5m;
pid {directory}/nginx.pid;
error_log {directory}/error.log warn;
events {{ worker_connections 8000; }}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    include {directory}/chatd.conf;
}}
"""


class Nginx:
    """In front of a chatd on `hub_port`. `without` is a line of the shipped file that somebody forgot."""

    def __init__(self, directory: Path, hub_port: int, *, without: str = "", instead: str = "") -> None:
        self.directory, self.port = directory, free_port()
        self.url, self.https = f"wss://{NAME}:{self.port}/ws", f"https://{NAME}:{self.port}"
        self.certificate = directory / "fullchain.pem"
        _make_certificate(directory)
        text = SHIPPED.read_text()
        assert without in text
        for shipped, here in {
            without or "\0": instead,
            "listen [::]:443 ssl sndbuf=64k;": "",
            "listen 443 ssl sndbuf=64k;": f"listen 127.0.0.1:{self.port} ssl sndbuf=64k;",
            "server 127.0.0.1:6001;": f"server 127.0.0.1:{hub_port};",
            "server_name chat.example.com;": f"server_name {NAME};",
            "/etc/letsencrypt/live/chat.example.com": str(directory),
            "/var/log/nginx": str(directory),
        }.items():
            text = text.replace(shipped, here)
        (directory / "chatd.conf").write_text(text)
        self.file = directory / "nginx.conf"
        user = "user root;" if _is_root() else ""
        self.file.write_text(FRAME.format(directory=directory, user=user))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Nginx:
        binary = shutil.which("nginx", path="/usr/sbin:/usr/local/sbin:/usr/bin")
        assert binary, "nginx is not installed: sh tests/install.sh"
        command = [
            binary,
            "-c",
            str(self.file),
            "-p",
            str(self.directory),
            "-e",
            str(self.directory / "error.log"),
        ]
        self._process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        until(lambda: (self.directory / "nginx.pid").exists() and self.workers(), self.log)
        return self

    def reload(self) -> None:
        """Return when new workers are there."""
        assert self._process is not None
        before = self.workers()
        self._process.send_signal(signal.SIGHUP)
        until(lambda: len(self.workers() - before) == 2, self.log)

    def workers(self) -> set[int]:
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        return {int(pid) for pid in children.split()}

    def log(self) -> str:
        return "\n".join(path.read_text() for path in self.directory.glob("*.log"))

    def __exit__(self, *_: object) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(START_SECONDS)


def until(condition: object, otherwise: object) -> None:
    """Poll, with a deadline."""
    assert callable(condition) and callable(otherwise)
    deadline = time.monotonic() + START_SECONDS
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.02)


def _make_certificate(directory: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-subj", f"/CN={NAME}", "-addext", f"subjectAltName=DNS:{NAME}", "-days", "90"]
    command += ["-keyout", str(directory / "privkey.pem"), "-out", str(directory / "fullchain.pem")]
    subprocess.run(command, check=True, capture_output=True)


def _is_root() -> bool:
    return Path("/proc/self").stat().st_uid == 0
