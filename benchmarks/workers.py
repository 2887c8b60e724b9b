"""I: two workers beside one: joins a second, and deliveries a second of a burst, with their CPU.

Where the clients have no core of their own, workers and clients wait for each other. So what the busiest worker
took is told too: with a core for each of them, that is what would limit them.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from benchmarks.audience import Audience
from benchmarks.daemons import SECRET, children, process_cpu, tell
from benchmarks.results import Results
from benchmarks.subjects import Daemon, Service
from chatd.auth.tokens import Tokens
from tests.faults.line import Line

JOINS, JOINS_CPU = "joins per second", "joins per CPU second of the busiest worker"
RATE, RATE_CPU = "deliveries per second, joined", "deliveries per CPU second of the busiest worker"
COMING = 100  # clients that connect at once
SUBSCRIBERS, MESSAGES = 4000, 100


def measure(results: Results, redis_url: str, *, clients: int, rounds: int) -> None:
    cores = sorted(os.sched_getaffinity(0))
    for number in range(rounds):
        for workers in (1, 2):
            tell(f"workers: {workers}, round {number + 1} of {rounds}")
            with _everywhere(), _daemon(workers, redis_url, cores) as service:
                _joins(results, service, workers, clients)
                _burst(results, service, workers)


@contextmanager
def _everywhere() -> Iterator[None]:
    """The clients may use every core, as the workers may: neither is kept from the other's."""
    mine = os.sched_getaffinity(0)
    os.sched_setaffinity(0, range(os.cpu_count() or 1))
    try:
        yield
    finally:
        os.sched_setaffinity(0, mine)


@contextmanager
def _daemon(workers: int, redis_url: str, cores: list[int]) -> Iterator[Service]:
    settings = {"redis__url": redis_url, "server__workers": workers}
    with Daemon(f"{workers} workers", **settings).start(-1) as service:
        yield service


def _joins(results: Results, service: Service, workers: int, clients: int) -> None:
    processes = _workers(service.pids()[0], workers)
    before = [process_cpu(pid) for pid in processes]
    elapsed = trio.run(_join, service.port, clients)
    used = [process_cpu(pid) - cpu for pid, cpu in zip(processes, before, strict=True)]
    results.add("I", JOINS, str(workers), "/s", clients / elapsed)
    results.add("I", JOINS_CPU, str(workers), "/s", clients / max(used))


async def _join(port: int, clients: int) -> float:
    tokens = [Tokens(SECRET).issue(number + 1, 3600) for number in range(clients)]
    lines: list[Line] = []

    async def come(numbers: range) -> None:
        for number in numbers:
            line = await Line.open(port, f"127.0.0.{2 + number % 8}")
            lines.append(line)
            await line.send("auth", ref=1, token=tokens[number], rooms={str(1 + number // 10): None})
            while not any(frame.event == "ready" for frame in await line.receive()):
                pass

    began = time.monotonic()
    async with trio.open_nursery() as nursery:
        for first in range(COMING):
            nursery.start_soon(come, range(first, clients, COMING))
    elapsed = time.monotonic() - began
    for line in lines:
        line.close()
    return elapsed


def _burst(results: Results, service: Service, workers: int) -> None:
    processes = _workers(service.pids()[0], workers)
    with Audience() as audience:
        while len(audience) < SUBSCRIBERS:
            audience.connect(service.port, service.enter)
        audience.hear(lambda: service.publish(MESSAGES, 0), 60)
        before = [process_cpu(pid) for pid in processes]
        elapsed = audience.hear(lambda: service.publish(MESSAGES, 0), 60)
        used = [process_cpu(pid) - cpu for pid, cpu in zip(processes, before, strict=True)]
    results.add("I", RATE, str(workers), "/s", SUBSCRIBERS * MESSAGES / elapsed)
    results.add("I", RATE_CPU, str(workers), "/s", SUBSCRIBERS * MESSAGES / max(used))


def _workers(pid: int, workers: int) -> list[int]:
    """The processes that serve: the daemon itself, or its children."""
    if workers == 1:
        return [pid]
    return children(pid)
