"""The service manager's side of `chatd.daemon.systemd`, played by a real datagram socket."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from chatd.daemon import systemd


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    path = tmp_path / "notify"
    with _bound(str(path)) as bound:
        monkeypatch.setenv("NOTIFY_SOCKET", str(path))
        yield bound


def _bound(address: str) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound.bind(address)
    bound.setblocking(
        False
    )  # what was sent is already there: a datagram on one machine is delivered by the sender
    return bound


def test_assignments_travel_in_one_datagram(manager: socket.socket) -> None:
    assert systemd.notify("WATCHDOG=1", "STATUS=fine")
    assert manager.recv(1000) == b"WATCHDOG=1\nSTATUS=fine"
    with pytest.raises(BlockingIOError):
        manager.recv(1000)


def test_ready_stopping_and_status(manager: socket.socket) -> None:
    systemd.ready("serving")
    systemd.status("3 connections")
    systemd.stopping("draining", 28.5)
    assert manager.recv(1000) == b"READY=1\nSTATUS=serving"
    assert manager.recv(1000) == b"STATUS=3 connections"
    assert manager.recv(1000) == b"STOPPING=1\nEXTEND_TIMEOUT_USEC=28500000\nSTATUS=draining"


def test_a_status_cannot_smuggle_in_an_assignment(manager: socket.socket) -> None:
    systemd.status("redis: refused\nREADY=1\r\nMAINPID=1")
    assert manager.recv(1000) == b"STATUS=redis: refused READY=1 MAINPID=1"


def test_a_status_may_hold_any_character(manager: socket.socket) -> None:
    systemd.status("café 👍 \udcff")
    assert manager.recv(1000) == "STATUS=café 👍 ?".encode()


def test_abstract_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"chatd-test-{os.getpid()}"
    with _bound("\0" + name) as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", "@" + name)
        systemd.ready("serving")
        assert manager.recv(1000) == b"READY=1\nSTATUS=serving"


@pytest.mark.parametrize(
    "address", ["", "/nonexistent/notify", "@chatd-test-nobody", "vsock:2:1234", "/" + 200 * "x"]
)
def test_without_a_listener_nothing_happens(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert systemd.notify("READY=1") is False


def test_outside_of_a_service_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    assert systemd.notify("READY=1") is False
    systemd.ready("serving")


def test_a_manager_that_does_not_read_costs_a_bounded_time(
    manager: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(systemd, "SEND_TIMEOUT", 0.01)
    begun = time.monotonic()
    while systemd.notify("STATUS=" + 1000 * "x"):  # until its queue is full
        assert time.monotonic() - begun < 10
    assert time.monotonic() - begun < 10


def test_the_watchdog_is_fed_at_half_of_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    assert systemd.watchdog_period() == 15.0
    monkeypatch.delenv("WATCHDOG_PID")
    assert systemd.watchdog_period() == 15.0


def test_the_watchdog_of_a_parent_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getppid()))
    assert systemd.watchdog_period() is None


@pytest.mark.parametrize("microseconds", [None, "", "0", "-5", "soon"])
def test_no_watchdog(monkeypatch: pytest.MonkeyPatch, microseconds: str | None) -> None:
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    monkeypatch.delenv("WATCHDOG_USEC", raising=False)
    if microseconds is not None:
        monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    assert systemd.watchdog_period() is None


# What it hands over.


def hand_over(monkeypatch: pytest.MonkeyPatch, **variables: str) -> list[tuple[str, int]]:
    for key in ("PID", "FDS", "FDNAMES"):
        monkeypatch.delenv(f"LISTEN_{key}", raising=False)
    for key, value in variables.items():
        monkeypatch.setenv(f"LISTEN_{key}", value)
    found = systemd.handed_over()
    assert not [name for name in os.environ if name.startswith("LISTEN_")], (
        "a child would take them for its own"
    )
    return found


def test_sockets_have_the_names_of_their_units(monkeypatch: pytest.MonkeyPatch) -> None:
    own = str(os.getpid())
    assert hand_over(monkeypatch, PID=own, FDS="3", FDNAMES="api:hub:hub") == [
        ("api", 3),
        ("hub", 4),
        ("hub", 5),
    ]
    assert hand_over(monkeypatch, PID=own, FDS="2") == [("unknown", 3), ("unknown", 4)]
    assert hand_over(monkeypatch, PID=own, FDS="0") == []


@pytest.mark.parametrize(("pid", "count"), [("", "2"), ("1", "2"), ("own", ""), ("own", "-1"), ("own", "two")])
def test_sockets_for_somebody_else_are_left_alone(
    monkeypatch: pytest.MonkeyPatch, pid: str, count: str
) -> None:
    pid = str(os.getpid()) if pid == "own" else pid
    assert hand_over(monkeypatch, PID=pid, FDS=count, FDNAMES="api:hub") == []
