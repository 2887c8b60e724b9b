"""A and B: one room, many subscribers, a message each 20 ms or a hundred at once, all subjects by turns."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from benchmarks.audience import Audience, Failure
from benchmarks.daemons import tell
from benchmarks.peers import Unavailable
from benchmarks.results import Results
from benchmarks.subjects import Service, Subject

PAUSE = 0.02  # seconds from message to message, where they come one by one
WARM_UP = 5  # messages
SETTLE = 4.0  # seconds after the last client has come
PATIENCE = 60.0  # seconds until a burst is given up

PACED, BURST, RATE = "CPU per delivery, one by one", "CPU per delivery, joined", "deliveries per second"


class Stage:
    """A server that runs, and its audience."""

    def __init__(self, service: Service, audience: Audience) -> None:
        self.service, self.audience = service, audience

    def fill(self, subscribers: int) -> None:
        while len(self.audience) < subscribers:
            self.audience.connect(self.service.port, self.service.enter)

    def send(self, count: int, pause: float) -> tuple[float, float]:
        """(CPU seconds of the server, seconds until everybody had everything), per delivery."""
        deliveries = count * len(self.audience)
        with _no_collection():
            before = self.service.cpu()
            elapsed = self.audience.hear(lambda: self.service.publish(count, pause), PATIENCE)
            used = self.service.cpu() - before
        return used / deliveries, elapsed / deliveries


@contextmanager
def stage(subject: Subject, core: int) -> Iterator[Stage]:
    with subject.start(core) as service, Audience() as audience:
        yield Stage(service, audience)


def measure(
    results: Results, subjects: Sequence[Subject], core: int, *, subscribers: int, messages: int, rounds: int
) -> None:
    with ExitStack() as stack:
        stages = dict(_ready(results, stack, subjects, core, subscribers))
        for number in range(rounds):
            for name in _turned(list(stages), number):
                tell(f"fan-out, round {number + 1} of {rounds}: {name}")
                try:
                    _round(results, name, stages[name], messages)
                except (Failure, OSError) as failure:
                    results.note(f"{name}, {subscribers:,} subscribers: {failure}.")
                    del stages[name]


def _ready(
    results: Results, stack: ExitStack, subjects: Sequence[Subject], core: int, subscribers: int
) -> Iterator[tuple[str, Stage]]:
    """Those that start, let everybody in, and deliver."""
    for subject in subjects:
        tell(f"fan-out: {subscribers:,} clients of {subject.name} come")
        try:
            one = stack.enter_context(stage(subject, core))
            one.fill(subscribers)
            one.audience.settle(SETTLE)
            one.send(WARM_UP, 0)
            one.send(WARM_UP, PAUSE)
        except (Failure, OSError, Unavailable) as failure:
            results.note(f"{subject.name}: {failure}.")
            continue
        yield subject.name, one


def _round(results: Results, name: str, one: Stage, messages: int) -> None:
    cpu, _ = one.send(messages, PAUSE)
    results.add("A", PACED, name, "µs", cpu * 1e6)
    cpu, elapsed = one.send(messages, 0)
    results.add("B", BURST, name, "µs", cpu * 1e6)
    results.add("B", RATE, name, "/s", 1 / elapsed)


def _turned(names: list[str], by: int) -> list[str]:
    """Nobody is always the first, or always after the same one's heat."""
    return [*names[by % len(names) :], *names[: by % len(names)]]


@contextmanager
def _no_collection() -> Iterator[None]:
    """The clients' process makes no garbage worth a pause."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
