"""What was measured, as it is kept: values by goal, measure and subject, and where they come from."""

from __future__ import annotations

import os
import platform
import sysconfig
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from statistics import median

import msgspec
from msgspec import Struct, field

from benchmarks.daemons import tell
from chatd import __version__

LIBRARIES = ("trio", "trio-websocket", "wsproto", "hypercorn", "quart", "redis", "SQLAlchemy", "psycopg")


class Record(Struct):
    """One measure of one subject. `values` are of several rounds, in `unit`."""

    goal: str
    measure: str
    subject: str
    unit: str
    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return median(self.values)


class Results(Struct):
    machine: dict[str, str]
    versions: dict[str, str] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, goal: str, measure: str, subject: str, unit: str, value: float) -> None:
        record = self.find(goal, measure, subject)
        if record is None:
            record = Record(goal, measure, subject, unit)
            self.records.append(record)
        record.values.append(value)

    def find(self, goal: str, measure: str, subject: str) -> Record | None:
        return next((r for r in self.of(goal, measure) if r.subject == subject), None)

    def of(self, goal: str, measure: str) -> list[Record]:
        return [r for r in self.records if (r.goal, r.measure) == (goal, measure)]

    def note(self, text: str) -> None:
        tell("")
        self.notes.append(text)

    def save(self, path: Path) -> None:
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")


def of_this_machine(cores: Iterable[int]) -> Results:
    server, mine = cores
    optimised = "--enable-optimizations" in (sysconfig.get_config_var("CONFIG_ARGS") or "")
    profiled = optimised or "-fprofile" in (sysconfig.get_config_var("PY_CORE_CFLAGS") or "")
    machine = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "processor": _processor(),
        "cores": f"{os.cpu_count()}, servers pinned to core {server}, clients and Redis to {mine}, loopback",
        "system": f"Linux {platform.release()}",
        "python": f"{platform.python_version()}{' (profile-guided build)' if profiled else ''}",
        "chatd": __version__,
        "libraries": ", ".join(f"{name} {version(name)}" for name in LIBRARIES),
    }
    return Results(machine)


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
