"""chatd under the real systemd, installed as it is shipped, in its sandbox: `make test-systemd`."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.booted.conftest import Tell
from tests.booted.machine import Machine

CHECKOUT = "/mnt/checkout"
CONFIG = "/etc/chatd/chatd.toml"
PYTHON = "/opt/chatd/bin/python"
UNITS = ("chatd", "chatd.socket", "chatd-api.socket")
UPGRADED = "HTTP/1.1 101"
TOKEN = "/etc/credstore/chatd.api.internal_token"


@pytest.fixture(autouse=True)
def running(machine: Machine) -> Iterator[None]:
    """Each test finds it as it was installed, and running."""
    config = machine.read(CONFIG)
    machine.changed = False
    yield
    if not machine.changed:
        return
    machine.write(CONFIG, config)
    for name in ("database.url", "redis.url"):
        machine.remove(f"/etc/credstore/chatd.{name}")
    machine.drop_in("")
    machine.run("systemctl", "reset-failed")
    machine.run("systemctl", "stop", "chatd.socket", "chatd-api.socket", "chatd")
    machine.run("systemctl", "start", "chatd.socket", "chatd-api.socket", "chatd")


def pid(machine: Machine) -> int:
    return int(machine.show("MainPID"))


def ask(machine: Machine, path: str) -> tuple[int, str]:
    """Status and body of the API's answer."""
    code = (
        "import sys, urllib.request, urllib.error\n"
        "try: answer = urllib.request.urlopen(urllib.request.Request('http://127.0.0.1:8080' + sys.argv[1],"
        " headers={'X-Internal-Token': open(sys.argv[2]).read().strip()}), timeout=20)\n"
        "except urllib.error.HTTPError as error: answer = error\n"
        "print(answer.status, answer.read().decode())"
    )
    status, _, body = machine.run(PYTHON, "-c", code, path, TOKEN).partition(" ")
    return int(status), body.strip()


@contextmanager
def connecting(machine: Machine, address: str = "127.0.0.1") -> Iterator[dict[str, Any]]:
    """A stream of handshakes while the block runs; how they went is in the dictionary after it."""
    found: dict[str, Any] = {}
    command = machine.enter(PYTHON, f"{CHECKOUT}/tests/booted/connects.py", address)
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as stream:
        assert stream.stdout is not None
        stream.stdout.readline()
        try:
            # What comes before the block and after it is part of the picture.
            time.sleep(1.0)
            yield found
            time.sleep(1.0)
            output, _ = stream.communicate("enough\n", timeout=60)
        except BaseException:
            stream.kill()
            raise
    found |= json.loads(output)


def figures(stream: dict[str, Any]) -> str:
    counts = stream["counts"]
    return (
        f"{sum(counts.values())} attempts, {counts.get('refused', 0)} refused,"
        f" outcomes {counts}, longest wait {stream['longest']} s"
    )


def served(machine: Machine, than: int) -> Callable[[], bool]:
    """Whether another process than this one serves."""
    return lambda: pid(machine) not in (0, than) and machine.show("ActiveState") == "active"


def test_it_starts_and_says_how_it_is(machine: Machine) -> None:
    assert machine.show("ActiveState") == "active"
    assert machine.show("StatusText").startswith("serving")
    assert ask(machine, "/readyz") == (200, '{"status":"ok","checks":{"database":"ok","migrations":"ok"}}')
    assert ask(machine, "/api/ws/users/1")[0] == 200, "the credential is the token"
    assert int(machine.show("NRestarts")) == 0
    # Its own database, in a directory that nobody else may enter.
    assert "chatd.db" in machine.run("ls", "/var/lib/private/chatd")
    machine.wait(lambda: machine.show("StatusText") == "serving 0 connections; database ok, migrations ok", 20)


def test_a_restart_refuses_nobody(machine: Machine, tell: Tell) -> None:
    before = pid(machine)
    with connecting(machine) as stream:
        machine.run("systemctl", "restart", "chatd")
        machine.run("systemctl", "restart", "chatd")
    tell(f"two restarts under connects: {figures(stream)}")
    assert pid(machine) != before
    assert set(stream["counts"]) == {UPGRADED}
    assert stream["longest"] < 10


def test_a_kill_refuses_nobody(machine: Machine, tell: Tell) -> None:
    before = pid(machine)
    with connecting(machine) as stream:
        machine.run("kill", "-KILL", str(before))
        took = machine.wait(served(machine, before))
    counts = stream["counts"]
    tell(f"kill -9 under connects: {figures(stream)}; serves again after {took:.1f} s")
    assert counts.pop(UPGRADED) > 10
    # Those that were in its hands at that moment: of each of the twenty one at most.
    assert "refused" not in counts
    assert sum(counts.values()) <= 20


# With a loop that SIGUSR1 stops.
STUCK = f"""[Service]
ExecStart=
ExecStart={PYTHON} {CHECKOUT}/tests/booted/stuck.py serve --config {CONFIG}
ExecPaths=/mnt/checkout
"""


def test_a_stuck_loop_is_ended_and_says_where(machine: Machine, tell: Tell) -> None:
    machine.drop_in(f"{STUCK}WatchdogSec=3\n")
    machine.run("systemctl", "restart", "chatd")
    before = pid(machine)
    machine.run("kill", "-USR1", str(before))
    took = machine.wait(served(machine, before))
    tell(f"a stuck loop, WatchdogSec=3: another process serves after {took:.1f} s")
    journal = machine.journal("--since=-1min")
    assert "the_loop_is_stuck" in journal, "the stack names the guilty function"
    assert re.search(
        "Watchdog timeout", machine.run("journalctl", "--no-pager", "--since=-1min", "-u", "chatd")
    )


def test_a_restart_of_one_that_has_to_be_killed_refuses_nobody(machine: Machine, tell: Tell) -> None:
    """It has failed, and in between; that is not what OnFailure= is for."""
    machine.drop_in(f"{STUCK}TimeoutStopSec=1\n")
    machine.run("systemctl", "restart", "chatd")
    with connecting(machine) as stream:
        machine.run("kill", "-USR1", str(pid(machine)))
        machine.run("systemctl", "restart", "chatd")
    tell(f"a restart that takes SIGKILL: {figures(stream)}")
    assert "refused" not in stream["counts"]
    assert [machine.show("ActiveState", unit) for unit in UNITS] == ["active"] * 3


def test_a_reload_takes_a_good_file(machine: Machine) -> None:
    before = pid(machine)
    machine.write(CONFIG, machine.read(CONFIG).replace("content_chars = 8000", "content_chars = 5"))
    machine.run("systemctl", "reload", "chatd")
    machine.wait(lambda: "reloaded, 1 options changed" in machine.show("StatusText"))
    assert (pid(machine), machine.show("ActiveState")) == (before, "active")


def test_a_reload_refuses_a_broken_file(machine: Machine) -> None:
    before = pid(machine)
    machine.write(CONFIG, machine.read(CONFIG).replace("content_chars = 8000", 'content_chars = "many"'))
    assert machine.try_run("systemctl", "reload", "chatd").returncode != 0
    assert "limits.content_chars" in machine.journal("--since=-1min")
    assert (pid(machine), machine.show("ActiveState")) == (before, "active")
    assert ask(machine, "/readyz")[0] == 200


def test_a_broken_configuration_is_not_tried_again(machine: Machine) -> None:
    machine.write(CONFIG, "[api]\nbind = 7\n")
    assert machine.try_run("systemctl", "restart", "chatd").returncode != 0
    assert machine.show("ExecMainStatus") == "78"
    assert (machine.show("ActiveState"), machine.show("NRestarts")) == ("failed", "0")
    assert "api.bind" in machine.journal("--since=-1min")


def test_a_broken_configuration_is_not_tried_again_for_clients_either(machine: Machine, tell: Tell) -> None:
    """The connections that wait would start it for ever: its ports are closed, until somebody starts it."""
    good = machine.read(CONFIG)
    machine.write(CONFIG, "[hub]\nbind = 7\n")
    with connecting(machine) as stream:
        assert machine.try_run("systemctl", "restart", "chatd").returncode != 0
        machine.wait(lambda: machine.show("ActiveState", "chatd.socket") == "inactive")
        time.sleep(1.0)  # time for another start
        assert machine.show("ActiveState") == "failed"
        starts = machine.journal("--since=-10s").count("hub.bind")
        machine.write(CONFIG, good)
        machine.run("systemctl", "restart", "chatd")
    tell(f"exit 78 under connects: {starts} start, then the ports are closed: {figures(stream)}")
    assert starts == 1
    assert [machine.show("ActiveState", unit) for unit in UNITS] == ["active"] * 3
    assert ask(machine, "/readyz")[0] == 200


def test_the_sandbox_holds(machine: Machine) -> None:
    unit = machine.read("/usr/local/lib/systemd/system/chatd.service")
    unit = re.sub("^(Sockets|ExecReload|Also|WantedBy|Restart.*|Watchdog.*)=.*\n", "", unit, flags=re.MULTILINE)
    unit = unit.replace("Type=notify", "Type=oneshot")
    unit = re.sub(
        "^ExecStart=.*$", f"ExecStart={PYTHON} {CHECKOUT}/tests/booted/probe.py", unit, flags=re.MULTILINE
    )
    machine.write("/etc/systemd/system/probe.service", unit)
    machine.run("systemctl", "daemon-reload")
    machine.run("systemctl", "start", "probe")
    said = machine.run("journalctl", "-u", "probe", "-o", "cat", "--no-pager")
    found = json.loads(re.findall("^probe (.*)$", said, re.MULTILINE)[-1])
    assert {name: text for name, text in found.items() if text == "done" or text == "none"} == {
        "write its own directory": "done",
        "its credential": "done",
        "other processes": "none",
    }
    assert found["this host"] == "ConnectionRefusedError Connection refused", (
        "loopback is allowed; nobody is there"
    )
    assert found["another host"] in ("PermissionError Operation not permitted", "TimeoutError")
    assert found["run a shell"].startswith("PermissionError")
    assert found["writable code"].startswith("PermissionError")
    # Nobody else sees what was handed to the service.
    assert machine.run("stat", "-c", "%a %U", "/run/credentials/chatd.service").split()[0] == "500"
    peek = machine.try_run(
        "runuser", "-u", "nobody", "--", "cat", "/run/credentials/chatd.service/api.internal_token"
    )
    assert "Permission denied" in peek.stderr
    assert "internal_token" not in machine.run("systemctl", "show", "--property=Environment", "chatd")


def test_clients_come_from_where_it_may_not_go(machine: Machine) -> None:
    """The lists of addresses are for what it opens itself: test_the_sandbox_holds looks at those."""
    port = "/etc/systemd/system/chatd.socket.d/test.conf"
    machine.write(port, "[Socket]\nListenStream=\nListenStream=6001\n")
    try:
        machine.run("systemctl", "daemon-reload")
        machine.run("systemctl", "stop", "chatd")
        machine.run("systemctl", "restart", "chatd.socket")
        with connecting(machine, "192.0.2.1") as stream:
            machine.wait(lambda: machine.show("ActiveState") == "active")  # a connection has started it
        assert set(stream["counts"]) == {UPGRADED}
    finally:
        machine.remove(port)


def test_workers(machine: Machine, tell: Tell) -> None:
    """In the same sandbox, with the ports that were handed to their parent, and Redis on a Unix socket."""
    redis = "redis-server --port 0 --unixsocket /run/redis.sock --unixsocketperm 777 --daemonize yes"
    machine.run("sh", "-c", redis)
    machine.write("/etc/credstore/chatd.redis.url", "unix:///run/redis.sock")
    machine.write(CONFIG, machine.read(CONFIG).replace("\nworkers = 1 ", "\nworkers = 2 "))
    machine.run("systemctl", "restart", "chatd")
    children = Path(f"/sys/fs/cgroup{machine.show('ControlGroup')}/cgroup.procs")
    assert len(machine.read(str(children)).split()) == 3
    with connecting(machine) as stream:
        machine.run("systemctl", "restart", "chatd")
    tell(f"a restart with two workers: {figures(stream)}")
    assert set(stream["counts"]) == {UPGRADED}


def test_without_a_network_of_its_own(machine: Machine) -> None:
    """The drop-in for local databases, with PostgreSQL on a Unix socket."""
    machine.run("sh", "-ec", POSTGRES)
    machine.write("/etc/credstore/chatd.database.url", "postgresql:///chatd?host=/run/pg&user=chatd")
    url = "CHATD_DATABASE__URL_FILE=/etc/credstore/chatd.database.url"
    migrate = f"{url} /opt/chatd/bin/chatd migrate --config {CONFIG}"
    machine.run("sh", "-c", migrate)
    machine.drop_in(machine.read(f"{CHECKOUT}/systemd/drop-ins/50-local-only.conf"))
    machine.run("systemctl", "restart", "chatd")
    assert 'db="postgresql"' in ask(machine, "/metrics")[1]
    with connecting(machine) as stream:
        assert ask(machine, "/readyz") == (200, '{"status":"ok","checks":{"database":"ok","migrations":"ok"}}')
    assert set(stream["counts"]) == {UPGRADED}
    # In a network of its own there is nothing but a loopback that nobody else is on.
    links = machine.run("nsenter", "--target", str(pid(machine)), "--net", "ip", "-brief", "link")
    assert [line.split()[0] for line in links.splitlines()] == ["lo"]


POSTGRES = r"""
bin=$(ls -d /usr/lib/postgresql/*/bin | tail -1)
install -d -o postgres /tmp/pg /run/pg
chmod 755 /run/pg
runuser -u postgres -- $bin/initdb --pgdata /tmp/pg/data --auth trust --no-sync >/dev/null
runuser -u postgres -- $bin/pg_ctl --pgdata /tmp/pg/data --log /tmp/pg/log --wait \
    --options "-c listen_addresses= -c unix_socket_directories=/run/pg -c fsync=off" start >/dev/null
runuser -u postgres -- psql -q -h /run/pg postgres -c "CREATE ROLE chatd LOGIN" \
    -c "CREATE DATABASE chatd OWNER chatd"
"""


def test_it_opens_its_ports_itself_where_systemd_does_not(machine: Machine) -> None:
    machine.run("systemctl", "mask", "--now", "chatd.socket", "chatd-api.socket")
    try:
        machine.drop_in(machine.read(f"{CHECKOUT}/systemd/drop-ins/40-own-ports.conf"))
        machine.run("systemctl", "restart", "chatd")
        assert ask(machine, "/readyz")[0] == 200
        with connecting(machine) as stream:
            ask(machine, "/healthz")
        assert set(stream["counts"]) == {UPGRADED}
    finally:
        machine.run("systemctl", "stop", "chatd")
        machine.run("systemctl", "unmask", "chatd.socket", "chatd-api.socket")
