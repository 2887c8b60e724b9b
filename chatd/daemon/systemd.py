"""What the service manager is told (ready, stopping, a status line, that the event loop still turns), and what
it hands over: listening sockets.

Without a service manager every call does nothing, so nobody has to ask for one. `workers` is one, too.
"""

from __future__ import annotations

import os
import socket
import time

# Seconds. The manager empties its socket at once; should it hang, losing a line is better than a stuck loop.
SEND_TIMEOUT = 1.0
FIRST_FD = 3  # where the sockets that are handed over begin: after stdin, stdout and stderr


def notify(*assignments: str) -> bool:
    """Send assignments such as `READY=1` as one datagram; whether the service manager got them.

    Nothing is raised: the daemon outlives a manager that does not listen. sd_notify(3) lists the assignments.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # an abstract socket: the kernel wants a zero byte in the place of the @
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as manager:
            manager.settimeout(SEND_TIMEOUT)
            manager.connect(address)
            manager.sendall("\n".join(assignments).encode(errors="replace"))
    except OSError:
        return False
    return True


def ready(status: str) -> None:
    """Say that the service is up: what waits for it starts, and the watchdog begins to count."""
    notify("READY=1", _status(status))


def stopping(status: str, seconds: float) -> None:
    """Say that the service has begun to stop, and may take so long: very many clients leave bit by bit."""
    notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}", _status(status))


def manages() -> bool:
    """Whether there is somebody to tell."""
    return "NOTIFY_SOCKET" in os.environ


def reloading() -> None:
    """Say that the configuration is being read: `ready` says that it is in force. systemd wants the moment."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def status(text: str) -> None:
    """Set the line that `systemctl status` shows."""
    notify(_status(text))


def watchdog_period() -> float | None:
    """Seconds between two `WATCHDOG=1`: half of what the unit allows; None if nobody watches this process."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # inherited from a parent that is watched itself
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or int(microseconds) == 0:
        return None
    return int(microseconds) / 1e6 / 2


def handed_over() -> list[tuple[str, int]]:
    """Name and descriptor of each socket that is handed to this process, as sd_listen_fds_with_names(3) has it.

    The variables are for one reader: they are unset, so that no other process takes the sockets for its own.
    """
    given = {key: os.environ.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES")}
    if given["PID"] != str(os.getpid()) or not given["FDS"].isdecimal():
        return []  # inherited from a parent, for which they were meant
    count = int(given["FDS"])
    names = given["FDNAMES"].split(":") if given["FDNAMES"] else []
    names += ["unknown"] * (count - len(names))  # as systemd calls what has no name
    return [(names[number], FIRST_FD + number) for number in range(count)]


def _status(text: str) -> str:
    # One line whatever the text: a line break would begin another assignment.
    return "STATUS=" + " ".join(text.split())
