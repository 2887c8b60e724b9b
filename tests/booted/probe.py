"""What a program can do in the service's sandbox: prints, as JSON, what came of each attempt."""

import ctypes
import json
import mmap
import os
import socket
import subprocess
from pathlib import Path


def connect(address: str, family: int = socket.AF_INET) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as one:
        one.settimeout(2)
        one.connect((address, 9))


def write(path: str) -> None:
    Path(path, "probe").write_text("x")


def writable_code() -> None:
    mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)


def packets() -> None:
    socket.socket(socket.AF_PACKET, socket.SOCK_RAW).close()


def others() -> str:
    mine = {os.getpid()}
    seen = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdecimal()]
    return "none" if set(seen) <= mine else "some"


def namespaces() -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(0x10000000):  # CLONE_NEWUSER
        raise OSError(ctypes.get_errno(), "unshare")


ATTEMPTS = {
    "write /etc": lambda: write("/etc"),
    "write /usr": lambda: write("/usr"),
    "write /opt/chatd": lambda: write("/opt/chatd"),
    "write its own directory": lambda: write(os.environ["STATE_DIRECTORY"]),
    "read /root": lambda: os.listdir("/root"),
    "read /etc/credstore": lambda: os.listdir("/etc/credstore"),
    "run a shell": lambda: subprocess.run(["/bin/sh", "-c", "true"], check=True),
    "writable code": writable_code,
    "raw packets": packets,
    "a user namespace": namespaces,
    "become root": lambda: os.setuid(0),
    # This host by an address that stands for another one: without the fence it refuses at once.
    "another host": lambda: connect("192.0.2.1"),
    "this host": lambda: connect("127.0.0.1"),
    "other processes": others,
    "its credential": lambda: (
        Path(os.environ["CREDENTIALS_DIRECTORY"], "api.internal_token").read_text() and None
    ),
}


def outcome(attempt: object) -> str:
    try:
        return attempt() or "done"  # type: ignore[operator]
    except (OSError, subprocess.SubprocessError) as error:
        return type(error).__name__ + (f" {os.strerror(error.errno)}" if getattr(error, "errno", None) else "")


print("probe " + json.dumps({name: outcome(attempt) for name, attempt in ATTEMPTS.items()}))
