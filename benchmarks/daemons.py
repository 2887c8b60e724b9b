"""A real chatd as a process of its own, pinned to a core, and what the kernel and /metrics tell of it.

It stands on the tests' daemon and clients: what they check there is what is timed here.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.daemon import Daemon

SECRET = "a secret of the benchmarks alone, long enough"


class Pinned(Daemon):
    """`chatd serve` on one core (-1: on any), with the limits of a benchmark."""

    def __init__(self, directory: Path, core: int, **settings: Any) -> None:
        defaults: dict[str, Any] = {"auth__secret": SECRET, "logs__level": "warning"}
        defaults["limits__sends_per_second"] = 0
        super().__init__(directory, **(defaults | settings))
        self._core = core

    def program(self) -> list[str]:
        pinned = ["taskset", "--cpu-list", str(self._core)] if self._core >= 0 else []
        return [*pinned, sys.executable, "-m", "chatd"]

    def cpu(self) -> float:
        """Seconds that it has used."""
        return process_cpu(self.pid)

    def memory(self, what: str = "VmRSS") -> int:
        """Bytes that it holds; `VmHWM` is the most since it was started."""
        status = Path(f"/proc/{self.pid}/status").read_text()
        found = re.search(rf"{what}:\s+(\d+) kB", status)
        return int(found[1]) * 1024 if found else 0

    def forget_peak(self) -> None:
        """`VmHWM` begins anew."""
        Path(f"/proc/{self.pid}/clear_refs").write_text("5")

    def metric(self, name: str) -> float:
        """The sum over all labels; nought if there is none."""
        page = self.get("/metrics").body.decode()
        return sum(float(value) for value in re.findall(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE))


def process_cpu(pid: int) -> float:
    """Seconds of CPU that a process has used, those of its threads that have ended among them.

    The kernel's clock of another process, by its number (clock_getcpuclockid(3)): exact where /proc has ticks.
    """
    return time.clock_gettime((~pid << 3) | 2)


def children(pid: int) -> list[int]:
    """Whichever of its threads has started them."""
    lists = [path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for found in lists for child in found]


def pin() -> tuple[int, int]:
    """(core for the server, core for this process). This process is moved to its own."""
    cores = sorted(os.sched_getaffinity(0))
    mine = cores[1 if len(cores) > 1 else 0]
    os.sched_setaffinity(0, {mine})
    return cores[0], mine


def pinned(cores: tuple[int, int]) -> str:
    server, mine = cores
    if server == mine:
        return f"server and load share core {mine}, the only one: they wait for each other"
    return f"chatd pinned to core {server}, load and clients to core {mine}; loopback"


def tell(progress: str) -> None:
    """One line that is written over, for a person who waits."""
    if sys.stderr.isatty():
        print(f"\r{progress:60}" + ("" if progress else "\r"), end="", file=sys.stderr, flush=True)


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(len(ordered) * share))] if ordered else float("nan")


def milliseconds(seconds: float) -> str:
    return f"{seconds * 1000:.1f}" if seconds < 0.1 else f"{seconds * 1000:,.0f}"
