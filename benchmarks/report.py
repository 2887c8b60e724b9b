"""What came of a run, for people: the goals with their figures, and the table of the peers. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from msgspec import Struct

from benchmarks import delay, fan, growth, ingest, join, smallrooms, workers
from benchmarks.results import Record, Results

CHATD, HUB = "chatd", "chatd, without post and commit"
UPGRADE = "trio-websocket, the upgrade alone"
BACK, BACK_99, STORM_CPU = "all are back after", "99 % are back after", "CPU of one that comes back"
ONE_NODE, TWO_NODES = "one node", "another node, through Redis"
OWN = (CHATD, HUB, UPGRADE, "write() alone", "trio-websocket, send_message to each")


class Goal(Struct, frozen=True):
    """`figure` of the results, None where it was not measured; met if `is_met(figure)`."""

    letter: str
    what: str
    wanted: str
    figure: Callable[[Results], float | None]
    shown: Callable[[float], str]
    is_met: Callable[[float], bool]


def _median(goal: str, measure: str, subject: str) -> Callable[[Results], float | None]:
    def figure(results: Results) -> float | None:
        found = results.find(goal, measure, subject)
        return found.median if found else None

    return figure


def _ratio(
    above: Callable[[Results], float | None], below: Callable[[Results], float | None]
) -> Callable[[Results], float | None]:
    def figure(results: Results) -> float | None:
        first, second = above(results), below(results)
        return first / second if first is not None and second else None

    return figure


def _best_peer(results: Results) -> float | None:
    peers = [record.median for record in results.of("A", fan.PACED) if record.subject not in OWN]
    return min(peers, default=None)


def _any_clients(measure: str) -> Callable[[Results], float | None]:
    def figure(results: Results) -> float | None:
        found = results.of("C", measure)
        return found[0].median if found else None

    return figure


def _per_core(way: str) -> Callable[[Results], float | None]:
    def figure(results: Results) -> float | None:
        found = next((r for r in results.of("E", ingest.CPU) if r.subject.startswith(way)), None)
        return 1e6 / found.median if found else None

    return figure


def _grown(measure: str, subject: str = "") -> Callable[[Results], float | None]:
    """Where there is much, over where there is little."""

    def figure(results: Results) -> float | None:
        found = [record for record in results.of("H", measure) if record.subject.startswith(subject)]
        return found[1].median / found[0].median if len(found) == 2 else None

    return figure


def _only(goal: str, measure: str) -> Callable[[Results], float | None]:
    def figure(results: Results) -> float | None:
        found = results.of(goal, measure)
        return found[0].median if found else None

    return figure


def _us(value: float) -> str:
    return f"{value:.2f} µs"


def _ms(value: float) -> str:
    return f"{value:.2f} ms"


def _seconds(value: float) -> str:
    return f"{value:.1f} s"


def _times(value: float) -> str:
    return f"{value:.2f} ×"


def _rate(value: float) -> str:
    return f"{value:,.0f}/s"


GOALS = (
    Goal("A", "CPU per delivery, with post and commit", "≤ 8 µs", _median("A", fan.PACED, CHATD), _us, lambda v: v <= 8),
    Goal("A", "… without them", "≤ 7 µs", _median("A", fan.PACED, HUB), _us, lambda v: v <= 7),
    Goal("A", "… over that of the best peer", "≤ 1", _ratio(_median("A", fan.PACED, HUB), _best_peer), _times, lambda v: v <= 1),
    Goal("B", "deliveries of a burst", "≥ 2,000,000/s", _median("B", fan.RATE, CHATD), _rate, lambda v: v >= 2e6),
    Goal("B", "… over that of nats-server", "≥ 2", _ratio(_median("B", fan.RATE, CHATD), _median("B", fan.RATE, "nats-server")), _times, lambda v: v >= 2),
    Goal("C", "CPU of a login, of many that come back", "≤ 0.8 ms", _any_clients(STORM_CPU), _ms, lambda v: v <= 0.8),
    Goal("C", "10,000 clients back, from the moment of the cut", "≤ 10 s", _any_clients(BACK), _seconds, lambda v: v <= 10),
    Goal("D", "memory of an idle, subscribed connection", "≤ 20 kB", _median("D", join.MEMORY, CHATD), lambda v: f"{v:.1f} kB", lambda v: v <= 20),
    Goal("E", "POST, one message, of a core", "≥ 1,200/s", _per_core("POST, one"), _rate, lambda v: v >= 1200),
    Goal("E", "POST, batches, of a core", "≥ 20,000/s", _per_core("POST, batches"), _rate, lambda v: v >= 20_000),
    Goal("E", "WebSocket `send`, of a core", "≥ 6,000/s", _per_core("WebSocket"), _rate, lambda v: v >= 6000),
    Goal("E", "`XADD chat.ingest`", "≥ 15,000/s", _per_core("XADD"), _rate, lambda v: v >= 15_000),
    Goal("F", "post to delivery, p50", "≤ 3 ms", _median("F", delay.P50, ONE_NODE), _ms, lambda v: v <= 3),
    Goal("F", "post to delivery, p99", "≤ 10 ms", _median("F", delay.P99, ONE_NODE), _ms, lambda v: v <= 10),
    Goal("F", "p50 through Redis, over that", "≤ 1.5", _ratio(_median("F", delay.P50, TWO_NODES), _median("F", delay.P50, ONE_NODE)), _times, lambda v: v <= 1.5),
    Goal("F", "p99 through Redis, over that", "≤ 1.5", _ratio(_median("F", delay.P99, TWO_NODES), _median("F", delay.P99, ONE_NODE)), _times, lambda v: v <= 1.5),
    Goal("G", "10,000 clients in rooms of 2, 2,000 messages/s", "≤ 60 % of a core", _only("G", smallrooms.LOAD), lambda v: f"{v:.0f} %", lambda v: v <= 60),
    Goal("H", "CPU per delivery, 10,000 in the room over 100", "≤ 1.2", _grown(growth.DELIVERY, HUB), _times, lambda v: v <= 1.2),
    Goal("H", "CPU of a login, 10,000 connections over 100", "≤ 1.2", _grown(growth.JOIN), _times, lambda v: v <= 1.2),
    Goal("H", "CPU of a post, 10,000,000 stored over 10,000", "≤ 1.2", _grown(growth.POST), _times, lambda v: v <= 1.2),
    Goal("I", "joins, two workers over one", "≥ 1.8", _ratio(_median("I", workers.JOINS, "2"), _median("I", workers.JOINS, "1")), _times, lambda v: v >= 1.8),
    Goal("I", "… by what the busiest worker took", "≥ 1.8", _ratio(_median("I", workers.JOINS_CPU, "2"), _median("I", workers.JOINS_CPU, "1")), _times, lambda v: v >= 1.8),
    Goal("I", "deliveries, two workers over one", "≥ 1.8", _ratio(_median("I", workers.RATE, "2"), _median("I", workers.RATE, "1")), _times, lambda v: v >= 1.8),
    Goal("I", "… by what the busiest worker took", "≥ 1.8", _ratio(_median("I", workers.RATE_CPU, "2"), _median("I", workers.RATE_CPU, "1")), _times, lambda v: v >= 1.8),
)  # fmt: skip


def markdown(results: Results) -> str:
    return "\n".join(_lines(results)) + "\n"


def _lines(results: Results) -> Iterator[str]:
    yield from _goals(results)
    yield from _peers(results)
    yield from _rest(results)
    for note in results.notes:
        yield f"- {note}"
    yield ""
    yield "; ".join(f"{name}: {value}" for name, value in results.machine.items()) + "."
    if results.versions:
        yield f"Peers: {', '.join(results.versions.values())}."


def _goals(results: Results) -> Iterator[str]:
    yield "| | | goal | measured | |"
    yield "|---|---|---|---|---|"
    for goal in GOALS:
        if (figure := goal.figure(results)) is not None:
            met = "met" if goal.is_met(figure) else "**missed**"
            yield f"| {goal.letter} | {goal.what} | {goal.wanted} | {goal.shown(figure)} | {met} |"
    yield ""


PEER_COLUMNS = (("A", fan.PACED), ("B", fan.BURST), ("B", fan.RATE), ("C", join.CPU), ("D", join.MEMORY))


def _peers(results: Results) -> Iterator[str]:
    names = list(dict.fromkeys(r.subject for goal, measure in PEER_COLUMNS for r in results.of(goal, measure)))
    if not names:
        return
    yield "| | CPU per delivery, one by one, µs | joined, µs | deliveries/s, 100 back to back | CPU to let one in, ms | memory, kB |"
    yield "|---|---|---|---|---|---|"
    for name in sorted(names, key=lambda name: _order(results, name)):
        cells = (spread(results.find(goal, measure, name)) for goal, measure in PEER_COLUMNS)
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""


def _order(results: Results, name: str) -> float:
    found = results.find("A", fan.PACED, name)
    return found.median if found else float("inf")


def _rest(results: Results) -> Iterator[str]:
    rest = [r for r in results.records if (r.goal, r.measure) not in PEER_COLUMNS]
    if not rest:
        return
    yield "| | measure | of | median (least–most) |"
    yield "|---|---|---|---|"
    for record in rest:
        yield f"| {record.goal} | {record.measure} | {record.subject} | {spread(record)} {record.unit} |"
    yield ""


def spread(record: Record | None) -> str:
    if record is None:
        return "–"
    middle = number(record.median)
    if len(record.values) == 1:
        return middle
    return f"{middle} ({number(min(record.values))}–{number(max(record.values))})"


def number(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
