"""One room, many subscribers: what a delivery costs through chatd's fanout, and with `send_message` for each.

The servers are processes of their own (`servers.py`), the clients are in this one (`audience.py`).
"""

from __future__ import annotations

import gc
import os
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.metadata import version
from statistics import median

import click
import msgspec
from msgspec import Struct

from benchmarks.audience import Audience, Failure
from benchmarks.servers import ROOM, SECRET, SMALLEST, Command, Go, Measure, Prepare, Usage, messages
from chatd import __version__
from chatd.auth.tokens import Tokens
from chatd.protocol import text_frame

PAUSE = 0.02  # seconds from message to message, where they come one by one
WARM_UP_MESSAGES = 5
# A burst is given up after so long: ten times what the slowest way takes.
BURST_SECONDS = 30.0
DELIVERY_SECONDS = 0.001
END_SECONDS = 10.0
DESCRIPTORS = 200  # beside the sockets
TOKEN_SECONDS = 24 * 3600


class Way(Struct, frozen=True):
    """A way to deliver: its name in the table, and where and how it is done."""

    name: str
    server: str
    way: str
    pause: float = 0.0


SEND_MESSAGE = Way("send_message", "plain", "send_message")
PUSH = Way("push", "chatd", "push")
JOINED = Way("push, joined", "chatd", "joined")
PACED = Way(f"push, every {PAUSE * 1000:.0f} ms", "chatd", "push", PAUSE)
WRITE = Way("os.write alone", "plain", "write")
WAYS = (SEND_MESSAGE, PUSH, JOINED, PACED, WRITE)


class Burst(Struct, frozen=True):
    """What one burst took, per delivery: seconds of the server's CPU, and of the clock."""

    user: float
    system: float
    elapsed: float

    @property
    def cpu(self) -> float:
        return self.user + self.system


class Arrival(Struct, frozen=True):
    """What one connection took: seconds of CPU to let it in, bytes of memory while it stays."""

    cpu: float
    memory: float


Bursts = dict[Way, list[Burst]]


class Server:
    """A server process and its audience."""

    def __init__(self, process: subprocess.Popen[bytes], audience: Audience) -> None:
        self._process, self._audience = process, audience
        self._seq = 0
        self._port = msgspec.json.decode(self._answer(), type=int)

    def connect(self, subscribers: int, tokens: Tokens | None) -> Arrival:
        """All of them, one after the other: each a user in the room, or without tokens a mere WebSocket."""
        issued = [tokens.issue(user, TOKEN_SECONDS) if tokens else None for user in range(1, subscribers + 1)]
        before = self._ask(Measure())
        for token in issued:
            self._audience.connect(self._port, ROOM, token)
        after = self._ask(Measure())
        cpu = after.user + after.system - before.user - before.system
        return Arrival(cpu / subscribers, (after.resident - before.resident) / subscribers)

    def burst(self, way: Way, subscribers: int, count: int, size: int) -> Burst:
        """Send so many messages to everybody, and wait until everybody has them. Raises Failure."""
        sent = messages(self._seq + 1, count, size)
        expected = b"".join(text_frame(change.payload) for change in sent)
        deliveries = subscribers * count
        before = self._ask(Prepare(self._seq + 1, count, size))
        self._seq += count
        start = time.monotonic()
        self._tell(Go(way.way, way.pause))
        self._audience.hear(expected, BURST_SECONDS + count * way.pause + deliveries * DELIVERY_SECONDS)
        elapsed = time.monotonic() - start
        self._answer()
        after = self._ask(Measure())
        user, system = after.user - before.user, after.system - before.system
        return Burst(user / deliveries, system / deliveries, elapsed / deliveries)

    def _ask(self, command: Command) -> Usage:
        self._tell(command)
        return msgspec.json.decode(self._answer(), type=Usage)

    def _tell(self, command: Command) -> None:
        assert self._process.stdin
        self._process.stdin.write(msgspec.json.encode(command))
        self._process.stdin.flush()

    def _answer(self) -> bytes:
        assert self._process.stdout
        if line := self._process.stdout.readline():
            return line
        raise Failure(f"the server process ended with {self._process.wait()}")


@contextmanager
def serving(name: str, core: int) -> Iterator[Server]:
    command = [sys.executable, "-m", "benchmarks.servers", name, str(core)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        with Audience() as audience:
            yield Server(process, audience)
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """It ends with its stdin, and says on stderr what was wrong, if anything was."""
    try:
        process.communicate(timeout=END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()


@click.command("fanout")
@click.option("--subscribers", type=click.IntRange(1, 20_000), default=1000, show_default=True)
@click.option("--messages", "count", type=click.IntRange(1, 1000), default=100, show_default=True)
@click.option("--bytes", "size", type=click.IntRange(SMALLEST, 8000), default=200, show_default=True)
@click.option("--rounds", type=click.IntRange(1, 100), default=5, show_default=True)
def command(subscribers: int, count: int, size: int, rounds: int) -> None:
    """One room, many subscribers: the server's CPU per delivery, and deliveries per second."""
    _allow_descriptors(subscribers)
    cores = sorted(os.sched_getaffinity(0))
    try:
        os.sched_setaffinity(0, {cores[-1 if len(cores) == 1 else 1]})
        click.echo(_heading(cores, subscribers, count, size, rounds))
        arrivals, bursts = _measure(cores[0], subscribers, count, size, rounds)
    except (Failure, OSError) as failure:
        raise click.ClickException(f"this run does not count: {failure}.") from failure
    finally:
        os.sched_setaffinity(0, cores)
    click.echo("\n".join(_report(arrivals, bursts, subscribers * count)))


def _allow_descriptors(subscribers: int) -> None:
    """Two audiences are in this process; each server inherits the limit."""
    needed = 2 * subscribers + DESCRIPTORS
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise click.ClickException(f"{needed} open files are needed and {hard} allowed (ulimit -Hn).")
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _measure(
    core: int, subscribers: int, count: int, size: int, rounds: int
) -> tuple[dict[str, Arrival], Bursts]:
    with ExitStack() as stack:
        servers = {name: stack.enter_context(serving(name, core)) for name in ("plain", "chatd")}
        arrivals = {
            "plain": servers["plain"].connect(subscribers, None),
            "chatd": servers["chatd"].connect(subscribers, Tokens(SECRET)),
        }
        for way in WAYS:
            servers[way.server].burst(way, subscribers, WARM_UP_MESSAGES, size)
        bursts: Bursts = {way: [] for way in WAYS}
        for number in range(rounds):
            for way in _turned(WAYS, number):
                with _no_collection():
                    bursts[way].append(servers[way.server].burst(way, subscribers, count, size))
    return arrivals, bursts


def _turned(ways: Sequence[Way], by: int) -> Sequence[Way]:
    """Nobody is always the first, or always after the same one's heat."""
    return [*ways[by % len(ways) :], *ways[: by % len(ways)]]


@contextmanager
def _no_collection() -> Iterator[None]:
    """The clients' process makes no garbage worth a pause."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


# The report.


def _heading(cores: list[int], subscribers: int, count: int, size: int, rounds: int) -> str:
    if len(cores) > 1:
        pinned = f"server pinned to core {cores[0]}, clients to core {cores[1]}"
    else:
        pinned = f"server and clients share core {cores[0]}, the only one: they wait for each other"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("trio", "trio-websocket", "wsproto"))
    return (
        f"fanout: {subscribers:,} subscribers of one room, {count} messages of {size} bytes,"
        f" rounds: {rounds}, interleaved\n"
        f"{pinned}; loopback\n"
        f"chatd {__version__}, Python {platform.python_version()}, {libraries}, Linux {platform.release()}\n"
    )


def _report(arrivals: dict[str, Arrival], bursts: Bursts, deliveries: int) -> Iterator[str]:
    yield f"{'':20}{'server CPU per delivery, µs':>36}{'deliveries per second':>36}"
    yield f"{'':20}{'median (min–max)':>22}{'user':>7}{'system':>7}{'median (min–max)':>36}"
    for way, found in bursts.items():
        yield _row(way, found)
    yield ""
    for way in (PUSH, JOINED):
        pairs = zip(bursts[SEND_MESSAGE], bursts[way], strict=True)
        ratios = _spread([slow.cpu / fast.cpu for slow, fast in pairs], _number)
        yield f"CPU of send_message over that of {way.name!r}, pair by pair: {ratios}"
    total = deliveries * sum(map(len, bursts.values()))
    yield f"Delivered: {total:,} of {total:,}, each compared byte by byte."
    yield ""
    yield f"{'one connection':20}{'CPU to let it in, µs':>22}{'memory, KiB':>14}"
    for name, what in (("plain", "upgrade"), ("chatd", "upgrade, auth, room")):
        arrival = arrivals[name]
        yield f"{what:20}{arrival.cpu * 1e6:22.0f}{arrival.memory / 1024:14.1f}"


def _row(way: Way, found: list[Burst]) -> str:
    cpu = _spread([burst.cpu * 1e6 for burst in found], _number)
    # The kernel splits by ticks of some ms: over all rounds that is exact enough, over one it is not.
    share = sum(burst.user for burst in found) / sum(burst.cpu for burst in found)
    middle = median(burst.cpu for burst in found) * 1e6
    split = f"{_number(middle * share):>7}{_number(middle * (1 - share)):>7}"
    rate = "–" if way.pause else _spread([1 / burst.elapsed for burst in found], lambda value: f"{value:,.0f}")
    return f"{way.name:20}{cpu:>22}{split}{rate:>36}"


def _spread(values: Sequence[float], shown: Callable[[float], str]) -> str:
    return f"{shown(median(values))} ({shown(min(values))}–{shown(max(values))})"


def _number(value: float) -> str:
    return f"{value:.2f}" if value < 10 else f"{value:.1f}"
