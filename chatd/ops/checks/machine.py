"""Checks of the system's limits, of the clock, and of who can read the secrets."""

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
TOKEN_CHARS = 32  # characters of an internal token; a shorter one might be guessed
TIMEDATECTL_SECONDS = 5.0


def exposure(case: Case) -> Iterator[Finding]:
    """Warn of settings that are valid but dangerous. `config.load` has already found the invalid ones."""
    config, subject = case.config, "configuration"
    origin = case.path or "defaults and environment"
    yield ok(subject, f"{origin}: valid")
    host, _ = split_bind(config.api.bind)
    if not is_loopback(host):
        yield warning(
            subject,
            f"api.bind is {config.api.bind}: other hosts can reach the internal API",
            "Bind it to 127.0.0.1, or let a firewall admit only your backend.",
        )
    host, _ = split_bind(config.hub.bind)
    if not is_loopback(host) and not config.limits.trusted_proxies:
        yield warning(
            subject,
            f"hub.bind is {config.hub.bind}: clients can connect without TLS, which exposes tokens",
            "Put a TLS proxy in front, bind to 127.0.0.1, and add the proxy to limits.trusted_proxies.",
        )
    elif config.limits.connections_per_address and not config.limits.trusted_proxies:
        yield warning(
            subject,
            "limits.connections_per_address without limits.trusted_proxies: a proxy's clients count as one",
            'Set limits.trusted_proxies = ["127.0.0.1"], or to the address of your proxy.',
        )
    if 0 < len(config.api.internal_token) < TOKEN_CHARS:
        yield warning(
            subject,
            f"api.internal_token has only {len(config.api.internal_token)} characters, and gives all rights",
            "Use a longer one: openssl rand -hex 32",
        )
    if config.hub.allow_query_token:
        yield warning(
            subject,
            "hub.allow_query_token is on: proxies log the tokens in URLs",
            "Set it to false, unless a client needs it.",
        )


def secrets(case: Case) -> Iterator[Finding]:
    """Whether only the owner can read and change the files that hold secrets."""
    held = list(_secret_files(case))
    wrong = [finding for path in held for finding in _too_open(path)]
    yield from wrong
    if not wrong:
        names = ", ".join(str(path) for path in held)
        yield ok(
            "secrets",
            f"other users cannot read {names}" if held else "no file has any: they come from the environment",
        )


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
            f"{path} holds secrets, and every user of this machine can {can} it ({stat.filemode(mode)})",
            f"chmod o= {path}, and replace the secrets if this machine has other users.",
        )
    elif mode & stat.S_IWGRP:
        yield warning(
            "secrets",
            f"{path} holds secrets, and its group can change it ({stat.filemode(mode)})",
            f"chmod g-w {path}",
        )


def public_keys(case: Case) -> Iterator[Finding]:
    """Whether only the owner can change the public keys: a person who can change one can log in as any user."""
    for name in case.config.auth.key_files:
        mode = Path(name).stat().st_mode
        if mode & (stat.S_IWGRP | stat.S_IWOTH):
            yield problem(
                "public keys",
                f"others can change {name} ({stat.filemode(mode)}), and so log in as any user",
                f"chmod go-w {name}",
            )
        else:
            yield ok("public keys", f"others cannot change {name}")


def connection_queue(case: Case) -> Finding:
    """Whether the kernel can queue enough connections until chatd accepts them."""
    subject = "somaxconn"
    try:
        found = int(SOMAXCONN.read_text())
    except OSError:
        return ok(subject, f"{SOMAXCONN} cannot be read here, as in a container or a sandbox")
    if found < BACKLOG:
        return warning(
            subject,
            f"net.core.somaxconn is {found}: if all clients reconnect at once, the kernel drops connections",
            f"sysctl -w net.core.somaxconn={BACKLOG}, and the same in /etc/sysctl.d/60-chatd.conf",
        )
    return ok(subject, f"net.core.somaxconn is {found}")


def clock(case: Case) -> Finding:
    """Whether the system's clock is synchronized. Tokens expire by it."""
    program = shutil.which("timedatectl")
    if program is None:
        return ok("clock", "it is not known whether it is synchronized: there is no timedatectl")
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
            "apt-get install systemd-timesyncd (or chrony), and check timedatectl.",
        )
    return ok(
        "clock", "it is synchronized" if answer == "yes" else "it is not known whether it is synchronized"
    )
