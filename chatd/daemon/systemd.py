"""The interface to the service manager: chatd reports that it is ready or stopping, its status and watchdog
pings, and takes over listening sockets.

Without a service manager all calls do nothing, so callers need not check for one. To the worker processes,
`workers` is the service manager.
"""

from __future__ import annotations

import os
import socket
import time

# Seconds. The manager normally reads its socket at once. If it hangs, a lost line is better than a blocked
# loop.
SEND_TIMEOUT = 1.0
FIRST_FD = 3  # the descriptor of the first inherited socket, after stdin, stdout and stderr; sd_listen_fds(3)


def notify(*assignments: str) -> bool:
    """Send assignments such as `READY=1` (sd_notify(3) lists them) as one datagram.

    Returns whether they were sent. Raises nothing: a daemon must not fail because its manager does not listen.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):  # an abstract socket: the kernel expects a zero byte instead of the @
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
    """Report that the service is ready: systemd starts units that wait for it, and its watchdog."""
    notify("READY=1", _status(status))


def stopping(status: str, seconds: float) -> None:
    """Report that the service has begun to stop, and may take `seconds`: many clients need a long drain."""
    notify("STOPPING=1", f"EXTEND_TIMEOUT_USEC={round(seconds * 1e6)}", _status(status))


def manages() -> bool:
    """Whether a service manager runs this process."""
    return "NOTIFY_SOCKET" in os.environ


def reloading() -> None:
    """Report that a reload has begun, with the time, which systemd requires. `ready` reports its end."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")


def status(text: str) -> None:
    """Set the line that `systemctl status` shows."""
    notify(_status(text))


def watchdog_period() -> float | None:
    """Return the seconds between two `WATCHDOG=1`: half of the unit's WatchdogSec=. None without a watchdog."""
    if os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return None  # the variables were meant for the parent of this process
    microseconds = os.environ.get("WATCHDOG_USEC", "")
    if not microseconds.isdecimal() or int(microseconds) == 0:
        return None
    return int(microseconds) / 1e6 / 2


def handed_over() -> list[tuple[str, int]]:
    """Return name and descriptor of each inherited socket, as sd_listen_fds_with_names(3) describes.

    The variables are unset, so that no child process uses the sockets as its own.
    """
    given = {key: os.environ.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES")}
    if given["PID"] != str(os.getpid()) or not given["FDS"].isdecimal():
        return []  # the variables were meant for the parent of this process
    count = int(given["FDS"])
    names = given["FDNAMES"].split(":") if given["FDNAMES"] else []
    names += ["unknown"] * (count - len(names))  # systemd's word for a socket without a name
    return [(names[number], FIRST_FD + number) for number in range(count)]


def _status(text: str) -> str:
    # A line break in the text would begin another assignment.
    return "STATUS=" + " ".join(text.split())
