"""C and D: what it costs to let clients in one after the other, and what each takes while it stays."""

from __future__ import annotations

import time
from collections.abc import Sequence

from benchmarks.audience import Failure
from benchmarks.daemons import tell
from benchmarks.fan import stage
from benchmarks.peers import Unavailable
from benchmarks.results import Results
from benchmarks.subjects import Subject

CPU, MEMORY = "CPU to let one in", "memory of one that is idle"
FIRST = 200  # clients before the count begins: what a server needs once is not theirs
SETTLE = 0.5  # seconds


def measure(results: Results, subjects: Sequence[Subject], core: int, *, clients: int, rounds: int) -> None:
    for number in range(rounds):
        for subject in subjects:
            tell(f"joining, round {number + 1} of {rounds}: {clients:,} clients of {subject.name}")
            try:
                _round(results, subject, core, clients)
            except (Failure, OSError, Unavailable) as failure:
                results.note(f"{subject.name}, {clients:,} clients: {failure}.")


def _round(results: Results, subject: Subject, core: int, clients: int) -> None:
    with stage(subject, core) as one:
        one.fill(FIRST)
        time.sleep(SETTLE)
        cpu, memory = one.service.cpu(), one.service.memory()
        one.fill(FIRST + clients)
        time.sleep(SETTLE)
        results.add("C", CPU, subject.name, "ms", (one.service.cpu() - cpu) / clients * 1e3)
        results.add("D", MEMORY, subject.name, "kB", (one.service.memory() - memory) / clients / 1e3)
