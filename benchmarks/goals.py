"""All goals in one run: chatd, its peers and the bare system call, side by side.

Each letter is a module: `fan` (A, B), `join` (C, D), `storm` (C), `ingest` (E), `delay` (F), `smallrooms` (G),
`growth` (H), `workers` (I). `report` and `plots` say what came of it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import click
import trio
from msgspec import Struct
from msgspec.structs import replace

from benchmarks import delay, fan, growth, ingest, join, plots, report, smallrooms, storm, workers
from benchmarks.audience import Failure
from benchmarks.daemons import Pinned, pin, tell
from benchmarks.peers import PEERS, Unavailable
from benchmarks.results import Results, of_this_machine
from benchmarks.subjects import Daemon, Foreign, OwnServer, Subject, allow_descriptors
from tests.services import RedisServer

HOME = Path(".bench")  # where peers are installed, and results are kept
DESCRIPTORS = 500  # beside the sockets: of ten thousand clients, or of the audiences of all subjects


class Scale(Struct, frozen=True):
    """How much of everything."""

    peers: tuple[str, ...]
    goals: str
    rounds: int = 3
    subscribers: int = 1000
    messages: int = 100
    clients: int = 10_000
    join_rounds: int = 2
    seconds: float = 5.0
    ingest_rounds: int = 3
    stored: int = 10_000_000


FULL = Scale(tuple(PEERS), "ABCDEFGHI")
QUICK = Scale(("websockets",), "ABCDE", rounds=3, clients=2000, join_rounds=1, seconds=2.0, ingest_rounds=1)

BARE = OwnServer("write() alone", "plain", "write")
SEND_MESSAGE = OwnServer("trio-websocket, send_message to each", "plain", "send_message")
HUB = OwnServer(report.HUB, "chatd", "push", "joined")


@click.command("goals")
@click.option("--quick", is_flag=True, help="Three minutes: A to E, beside write() alone and websockets.")
@click.option("--only", default="", help="Some of the letters, as in --only ABH.")
@click.option("--peer", "peers", multiple=True, type=click.Choice([*PEERS, "none"]), help="Repeatable; all.")
@click.option("--stored", type=int, help="Messages in the database of H; ten millions take minutes and 4 GB.")
@click.option("--output", type=click.Path(path_type=Path), default=HOME / "results", show_default=True)
def command(quick: bool, only: str, peers: tuple[str, ...], stored: int | None, output: Path) -> None:
    """The goals A to I, chatd beside its peers: tables, JSON and plots."""
    scale = QUICK if quick else FULL
    changes: dict[str, Any] = {"goals": only.upper() or scale.goals}
    if peers:
        changes["peers"] = tuple(peer for peer in peers if peer != "none")
    if stored:
        changes["stored"] = stored
    cores = pin()
    results = of_this_machine(cores)
    output.mkdir(parents=True, exist_ok=True)
    try:
        allow_descriptors(max(scale.clients, 15 * scale.subscribers) + DESCRIPTORS)
    except Failure as failure:
        raise click.ClickException(f"{failure}.") from failure
    for letters, measure in _steps(results, replace(scale, **changes), cores[0]):
        try:
            measure()
        except* Exception as group:  # the others still count
            results.note(f"{letters} does not count: {group.exceptions[0]!r}.")
        results.save(output / "results.json")
    tell("")
    (output / "results.md").write_text(report.markdown(results))
    drawn = plots.draw(results, output)
    click.echo(report.markdown(results))
    click.echo(f"\n{output}: results.json, results.md{''.join(f', {path.name}' for path in drawn)}")


def _steps(results: Results, scale: Scale, core: int) -> Iterator[tuple[str, Callable[[], None]]]:
    """Those that are wanted, in an order that a person would read."""
    steps: dict[str, Callable[[list[Subject]], None]] = {
        "AB": lambda peers: _fan(results, scale, core, peers),
        "CD": lambda peers: _join(results, scale, core, peers),
        "C": lambda _: _storm(results, core, scale.clients),
        "E": lambda _: _ingest(results, scale, core),
        "F": lambda _: _delay(results, core, scale),
        "G": lambda _: _small_rooms(results, scale, core),
        "H": lambda _: _growth(results, scale, core),
        "I": lambda _: _workers(results, scale),
    }
    wanted = set(scale.goals)
    peers = list(_installed(results, scale)) if wanted & set("ABCD") else []
    for letters, step in steps.items():
        if wanted & set(letters):
            yield letters, partial(step, peers)


def _fan(results: Results, scale: Scale, core: int, peers: list[Subject]) -> None:
    subjects = [BARE, SEND_MESSAGE, HUB, Daemon(report.CHATD), *peers]
    counts = {"subscribers": scale.subscribers, "messages": scale.messages, "rounds": scale.rounds}
    fan.measure(results, subjects, core, **counts)


def _join(results: Results, scale: Scale, core: int, peers: list[Subject]) -> None:
    subjects = [OwnServer(report.UPGRADE, "plain", "write"), Daemon(report.CHATD), *peers]
    join.measure(results, subjects, core, clients=scale.clients, rounds=scale.join_rounds)


def _ingest(results: Results, scale: Scale, core: int) -> None:
    with _redis(results) as url, _node(core, redis__url=url) as node:
        ingest.measure(results, node, url, seconds=scale.seconds, rounds=scale.ingest_rounds)


def _small_rooms(results: Results, scale: Scale, core: int) -> None:
    with _node(core) as node:
        smallrooms.measure(results, node, clients=scale.clients, rate=2000, seconds=10, rounds=3)


def _growth(results: Results, scale: Scale, core: int) -> None:
    for subject in (HUB, BARE):
        growth.deliveries(results, subject, core, scale.rounds)
    growth.joins(results, core, scale.join_rounds)
    with tempfile.TemporaryDirectory(prefix="chatd-benchmark-") as directory:
        growth.posts(results, core, Path(directory), scale.stored, scale.rounds)


def _workers(results: Results, scale: Scale) -> None:
    with _redis(results) as url:
        if url:
            workers.measure(results, url, clients=min(scale.clients, 4000), rounds=scale.join_rounds)


def _installed(results: Results, scale: Scale) -> Iterator[Subject]:
    for name in scale.peers:
        tell(f"installing {name}")
        try:
            PEERS[name].install(HOME)
            results.versions[PEERS[name].name] = PEERS[name].version(HOME)
            yield Foreign(PEERS[name], HOME)
        except Unavailable as failure:
            results.note(f"{PEERS[name].name} was not measured: {failure}")


def _storm(results: Results, core: int, clients: int) -> None:
    with _node(core, limits__handshakes_per_second=0) as node:
        found = trio.run(storm.storm, node, clients, 0)
    results.add("C", report.BACK, f"{clients:,} clients", "s", max(found.back))
    results.add("C", report.BACK_99, f"{clients:,} clients", "s", sorted(found.back)[int(0.99 * clients)])
    results.add("C", report.STORM_CPU, f"{clients:,} clients", "ms", found.cpu / clients * 1e3)


def _delay(results: Results, core: int, scale: Scale) -> None:
    for _ in range(scale.ingest_rounds):
        with _node(core) as node:
            delay.measure(results, report.ONE_NODE, node, node, scale.seconds)
        with _redis(results) as url, tempfile.TemporaryDirectory(prefix="chatd-benchmark-") as shared:
            if url:
                settings = {"redis__url": url, "database__url": f"sqlite:///{shared}/chatd.db"}
                with _node(core, **settings) as one, _node(core, **settings) as other:
                    delay.measure(results, report.TWO_NODES, one, other, scale.seconds)


@contextmanager
def _node(core: int, **settings: Any) -> Iterator[Pinned]:
    settings = {"limits__handshakes_per_second": 0, "hub__ping_interval": 3600} | settings
    with tempfile.TemporaryDirectory(prefix="chatd-benchmark-") as directory:
        node = Pinned(Path(directory), core, **settings)
        try:
            node.start()
            yield node
        finally:
            node.close()


@contextmanager
def _redis(results: Results) -> Iterator[str]:
    """Its URL; an empty one where there is none. It shares the core of the clients."""
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory(prefix="chatd-benchmark-"))
        try:
            url = stack.enter_context(RedisServer(Path(directory), durable=False)).url
        except RuntimeError as error:
            results.note(f"without Redis: {error}")
            url = ""
        yield url
