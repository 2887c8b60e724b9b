"""A machine with systemd as its first process, in namespaces of this one, with chatd installed as a service."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
BOOT_SECONDS = 240.0  # pip builds and installs chatd meanwhile
PATIENCE = 30.0  # seconds for anything else
POLL = 0.05


def why_not() -> str:
    """Why no machine can be booted here; empty if one can."""
    if os.geteuid() != 0:
        return "it needs root"
    if not Path("/lib/systemd/systemd").exists():
        return "systemd is not installed"
    missing = [name for name in ("unshare", "nsenter", "setpriv", "ip") if shutil.which(name) is None]
    if missing:
        return f"missing: {', '.join(missing)}"
    python = "import ensurepip, sys; sys.exit(sys.version_info < (3, 11))"
    if (
        shutil.which("/usr/bin/python3") is None
        or subprocess.run(["/usr/bin/python3", "-c", python]).returncode
    ):
        return "make install wants /usr/bin/python3 to be 3.11 or newer, with python3-venv"
    command = ["unshare", "--mount", "--pid", "--fork", "--cgroup", "--net", "sh", "-ec", MOUNTS]
    found = subprocess.run(command, capture_output=True, text=True)
    return f"no rights to mount: {found.stderr.strip()}" if found.returncode else ""


# What boot.sh needs the kernel to allow; gone with the shell.
MOUNTS = """
mount -t tmpfs tmpfs /mnt
cd /mnt
mkdir upper work merged cgroup
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work merged
mount -t cgroup2 cgroup2 cgroup
mkdir cgroup/chatd-test-$$
rmdir cgroup/chatd-test-$$
"""


class Machine:
    """A context manager. Everything in it is gone with it."""

    def __init__(self) -> None:
        self._place = Path(tempfile.mkdtemp(prefix="chatd-machine-"))
        self._cgroup = f"chatd-test-{os.getpid()}"
        self._log = self._place / "boot.log"
        self._boot: subprocess.Popen[bytes] | None = None
        self._pid = 0  # of its systemd, as it is seen from here
        self.changed = False  # by `write`

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _start(self) -> None:
        for name in ("cgroup", "machine"):
            (self._place / name).mkdir()
        script = ["sh", str(HERE / "boot.sh"), str(REPOSITORY), self._cgroup, str(self._place)]
        # The mount of the hierarchy is in a namespace of ours, and leaves with it.
        # Should we be killed it goes with us.
        command = ["setpriv", "--pdeathsig", "KILL", "unshare", "--mount", "--propagation", "private", *script]
        with self._log.open("wb") as log:
            self._boot = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.wait(self._booted, BOOT_SECONDS)

    def _booted(self) -> bool:
        assert self._boot is not None
        if self._boot.poll() is not None:
            raise RuntimeError(f"The machine did not boot:\n{self._log.read_text()}")
        self._pid = self._pid or self._find_systemd()
        if not self._pid:
            return False
        return self.try_run("systemctl", "is-active", "basic.target").stdout.strip() == "active"

    def _find_systemd(self) -> int:
        """The child of the last `unshare` in boot.sh, once it has become systemd; 0 before."""
        assert self._boot is not None
        children = Path(f"/proc/{self._boot.pid}/task/{self._boot.pid}/children").read_text().split()
        for pid in children:
            with suppress(OSError):  # a `mkdir` of the script, and gone meanwhile
                if Path(f"/proc/{pid}/comm").read_text() == "systemd\n":
                    return int(pid)
        return 0

    def _end(self) -> None:
        if self._boot is not None:
            # Everything in the namespaces dies with their first process, and that with its parent.
            self._boot.kill()
            self._boot.wait()
        self._remove_cgroups()
        shutil.rmtree(self._place)

    def _remove_cgroups(self) -> None:
        """Bottom up, and as soon as the kernel has buried what was in them."""
        place = self._place / "cgroup"
        if not place.is_dir():
            return
        script = f"""
            mount -t cgroup2 cgroup2 {place} || exit 0
            for again in $(seq 100); do
                find {place}/{self._cgroup} -depth -type d -exec rmdir {{}} \\; 2>/dev/null
                [ -d {place}/{self._cgroup} ] || exit 0
                sleep 0.05
            done
        """
        subprocess.run(["unshare", "--mount", "sh", "-c", script], check=False)

    # In it.

    def enter(self, *command: str) -> list[str]:
        """The command line that runs a command in it."""
        return ["nsenter", "--target", str(self._pid), "--all", "--wd", "--", *command]

    def try_run(self, *command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(self.enter(*command), capture_output=True, text=True, timeout=PATIENCE * 2)

    def run(self, *command: str) -> str:
        """What it printed; it must have succeeded."""
        done = self.try_run(*command)
        assert done.returncode == 0, f"{' '.join(command)}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def start(self, *command: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            self.enter(*command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True
        )

    def write(self, path: str, text: str) -> None:
        self.changed = True
        Path(f"/proc/{self._pid}/root{path}").parent.mkdir(parents=True, exist_ok=True)
        Path(f"/proc/{self._pid}/root{path}").write_text(text)

    def read(self, path: str) -> str:
        return Path(f"/proc/{self._pid}/root{path}").read_text()

    def remove(self, path: str) -> None:
        Path(f"/proc/{self._pid}/root{path}").unlink(missing_ok=True)

    def show(self, name: str, unit: str = "chatd") -> str:
        """A property of a unit."""
        return self.run("systemctl", "show", "--value", "--property", name, unit).strip()

    def drop_in(self, text: str) -> None:
        """The one drop-in of chatd.service; empty for none."""
        path = "/etc/systemd/system/chatd.service.d/test.conf"
        if text:
            self.write(path, text)
        else:
            self.remove(path)
        self.run("systemctl", "daemon-reload")

    def journal(self, *arguments: str) -> str:
        return self.run("journalctl", "--unit", "chatd", "--output", "cat", "--no-pager", *arguments)

    def wait(self, condition: Callable[[], Any], patience: float = PATIENCE) -> float:
        """Seconds until it holds."""
        began = time.monotonic()
        while not condition():
            if time.monotonic() - began > patience:
                raise AssertionError(f"This took longer than {patience:.0f} s:\n{self._log.read_text()}")
            time.sleep(POLL)
        return time.monotonic() - began
