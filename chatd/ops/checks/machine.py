"""Limits of the system, the clock, and who may read the secrets."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path

from chatd.config import is_loopback, split_bind
from chatd.net.gate import BACKLOG
from chatd.ops.finding import Case, Finding, ok, others_may, problem, warning
from chatd.ops.redaction import holds_secret

SOMAXCONN = Path("/proc/sys/net/core/somaxconn")
TOKEN_CHARS = 32  # fewer can be guessed
TIMEDATECTL_SECONDS = 5.0


def exposure(case: Case) -> Iterator[Finding]:
    """What the configuration allows that few mean to allow. That it is right otherwise was checked before."""
    config, subject = case.config, "configuration"
    origin = case.path or "defaults and environment"
    yield ok(subject, f"{origin}: nothing is wrong with it")
    host, _ = split_bind(config.api.bind)
    if not is_loopback(host):
        yield warning(
            subject,
            f"api.bind is {config.api.bind}: other hosts reach the internal API",
            "Bind it to 127.0.0.1, or let a firewall keep everybody but your backend away.",
        )
    host, _ = split_bind(config.hub.bind)
    if not is_loopback(host) and not config.limits.trusted_proxies:
        yield warning(
            subject,
            f"hub.bind is {config.hub.bind}: clients can come without TLS, and their tokens can be read",
            "Put a proxy with TLS in front, bind to 127.0.0.1, and name it in limits.trusted_proxies.",
        )
    elif config.limits.connections_per_address and not config.limits.trusted_proxies:
        yield warning(
            subject,
            "limits.connections_per_address without limits.trusted_proxies: all of a proxy count as one",
            'Set limits.trusted_proxies = ["127.0.0.1"], or wherever the proxy is.',
        )
    if 0 < len(config.api.internal_token) < TOKEN_CHARS:
        yield warning(
            subject,
            f"api.internal_token has {len(config.api.internal_token)} characters, and opens everything",
            "Take a longer one: openssl rand -hex 32",
        )
    if config.hub.allow_query_token:
        yield warning(
            subject,
            "hub.allow_query_token is on: tokens in URLs reach the logs of proxies",
            "Set it to false unless a client needs it.",
        )


def secrets(case: Case) -> Iterator[Finding]:
    """Files that hold secrets, and directories of credentials: for their owner alone."""
    held = list(_secret_files(case))
    wrong = [finding for path in held for finding in _too_open(path)]
    yield from wrong
    if not wrong:
        names = ", ".join(str(path) for path in held) or "none; they come from the environment"
        yield ok("secrets", f"files with secrets are closed to others: {names}")


def _secret_files(case: Case) -> Iterator[Path]:
    if case.path is not None and holds_secret(case.path):
        yield case.path
    for name, value in sorted(os.environ.items()):
        if name.startswith("CHATD_") and name.endswith("_FILE") and "__" in name:
            yield Path(value)
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    yield from sorted(Path(directory).glob("*.*")) if directory else ()


def _too_open(path: Path) -> Iterator[Finding]:
    mode = path.stat().st_mode
    if others_may(path, stat.S_IROTH | stat.S_IWOTH):
        can = "read" if mode & stat.S_IROTH else "write"
        yield problem(
            "secrets",
            f"{path} holds secrets, and everybody on this machine can {can} it ({stat.filemode(mode)})",
            f"chmod o= {path}, and make new secrets if others were on this machine.",
        )
    elif mode & stat.S_IWGRP:
        yield warning(
            "secrets",
            f"{path} holds secrets, and its group can change it ({stat.filemode(mode)})",
            f"chmod g-w {path}",
        )


def public_keys(case: Case) -> Iterator[Finding]:
    """Whoever can change one can be any user."""
    for name in case.config.auth.key_files:
        mode = Path(name).stat().st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield problem(
                "public keys",
                f"{name} can be changed by others ({stat.filemode(mode)}): they could be any user",
                f"chmod go-w {name}",
            )
        else:
            yield ok("public keys", f"{name} is closed to changes")


def connection_queue(case: Case) -> Finding:
    """Connections that the kernel keeps while a burst is accepted."""
    subject = "somaxconn"
    try:
        found = int(SOMAXCONN.read_text())
    except OSError:
        return ok(subject, f"{SOMAXCONN} cannot be read here, as in a container or a sandbox")
    if found < BACKLOG:
        return warning(
            subject,
            f"net.core.somaxconn is {found}: when all clients come back at once, the kernel drops connections",
            f"sysctl -w net.core.somaxconn={BACKLOG}, and the same in /etc/sysctl.d/60-chatd.conf",
        )
    return ok(subject, f"net.core.somaxconn is {found}")


def clock(case: Case) -> Finding:
    """Whether somebody keeps it right. Tokens expire by it."""
    program = shutil.which("timedatectl")
    if program is None:
        return ok("clock", "whether it is kept right is not known: there is no timedatectl here")
    ran = subprocess.run(
        [program, "show", "--property=NTPSynchronized", "--value"],
        capture_output=True,
        text=True,
        timeout=TIMEDATECTL_SECONDS,
    )
    answer = ran.stdout.strip()
    if answer == "no":
        return warning(
            "clock",
            "it is not synchronized: tokens would expire too early or too late",
            "apt-get install systemd-timesyncd (or chrony), and see timedatectl.",
        )
    kept = "it is synchronized" if answer == "yes" else "whether it is kept right is not known"
    return ok("clock", kept)
