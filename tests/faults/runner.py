"""A run: one cluster, a load, one fault after the other, and what the checker says of the whole.

Each phase is load with a fault in it, then quiet until every client has everything; the next goes on with the
same daemons, clients and data. The history is checked as one, for a loss may show only later.
"""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from time import monotonic
from typing import IO

import msgspec
import trio
from msgspec import Struct

from tests.backend import serving
from tests.faults import crowd, nemesis, presence
from tests.faults.checker import Verdict, check
from tests.faults.cluster import SECRET, Cluster, Node
from tests.faults.contents import contents, heads
from tests.faults.history import History, Kind, Outcome, Past, save
from tests.faults.links import Links
from tests.faults.member import Spec
from tests.faults.nemesis.clients import HALF_OPEN_SOURCE, SILENCE
from tests.faults.nemesis.field import Field, blocking
from tests.faults.presence import Presence
from tests.faults.workload import FLAPPED, Backend, Workload

FINISH_SECONDS = 25.0  # for what was begun when the load ends: a write is answered in 15
LOOK_EVERY = 0.5  # seconds between two looks at memory and metrics
POSTERS = 4
WANDERERS = 10  # of each half of the clients
BEHIND_SHOWN = 20  # lines about who has not caught up
OTHERS = 900_000  # users from here on are no room's members
REPOSITORY = Path(__file__).parents[2]


class Plan(Struct):
    kind: str
    phases: list[str]
    seconds: float
    seed: int
    rooms: int
    clients_per_room: int
    patience: float  # seconds that clients have to catch up
    bug: str | None = None
    rate: int = 0  # messages a second in batches, on top of the posters'
    presence: bool = True  # wait after each fault until every picture of who is online has come true


class Phase(Struct):
    """What a phase came to. Times are seconds; `settled` is None where not everybody caught up."""

    name: str
    began: float
    healed: float = 0.0
    ended: float = 0.0
    settled: float | None = None
    acknowledged: int = 0
    unknown: int = 0
    unavailable: float = 0.0
    median: float = 0.0
    p99: float = 0.0
    repaired: int = 0
    started_over: int = 0
    peak: int = 0
    notes: list[str] = []
    anomalies: dict[str, int] = {}
    gone: int = 0
    presence: float | None = None  # until every picture of who is online was true


class Result(Struct):
    plan: Plan
    phases: list[Phase]
    verdict: Verdict
    troubles: list[str]
    heard: int

    @property
    def valid(self) -> bool:
        settled = all(phase.settled is not None for phase in self.phases)
        return bool(self.verdict.valid) and not self.troubles and settled


class Process:
    """A crowd, as the runner holds it."""

    def __init__(self, spec: Spec, log: IO[bytes]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.faults.crowd"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
        )
        self._say(spec)

    @property
    def pid(self) -> int:
        return self._process.pid

    def do(self, what: str, path: str = "") -> bytes:
        return self._say(crowd.Do(what, path))

    def report(self) -> crowd.Report:
        return msgspec.json.decode(self.do("report"), type=crowd.Report)

    def result(self, path: Path) -> crowd.Result:
        self.do("stop", str(path))
        return msgspec.msgpack.decode(path.read_bytes(), type=crowd.Result)

    def close(self) -> None:
        self._process.kill()
        self._process.wait()

    def _say(self, what: Struct) -> bytes:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.write(msgspec.json.encode(what) + b"\n")
        self._process.stdin.flush()
        if answer := self._process.stdout.readline():
            return answer
        raise RuntimeError("a crowd has ended by itself")


class Run:
    def __init__(self, plan: Plan, directory: Path, tell: Callable[[str], None]) -> None:
        """`tell` gets a line for a person, as the run goes on."""
        self._plan, self._directory, self._tell = plan, directory, tell
        self._dice = random.Random(plan.seed)
        self._phases: list[Phase] = []
        self._troubles: list[str] = []
        self._past: list[Past] = []
        self._presence: Presence | None = None

    async def run(self) -> Result:
        plan = self._plan
        with ExitStack() as stack:
            told = stack.enter_context(serving())
            settings = presence.settings_of(told) if plan.presence else {}
            cluster = Cluster(plan.kind, self._directory, plan.bug, **settings)
            await blocking(stack.enter_context, cluster)
            workload = Workload(cluster.api_ports, plan.rooms, POSTERS, plan.seed, plan.rate)
            links = Links(cluster.ports)
            async with trio.open_nursery() as nursery:
                await nursery.start(links.run)
                crowds = await blocking(stack.enter_context, self._crowds(cluster, links))
                nursery.start_soon(self._look, cluster.nodes)
                if plan.presence:
                    self._presence = Presence(told, cluster.ports, cluster.api_ports, SECRET, SILENCE)
                    await nursery.start(self._presence.run)
                await self._settle(cluster, crowds)  # everybody is there
                for name in plan.phases:
                    await self._phase(name, cluster, crowds, workload, links)
                settled = monotonic()
                history = await self._history(cluster, crowds, workload, settled)
                nursery.cancel_scope.cancel()
            troubles = self._troubles + [trouble for node in cluster.nodes for trouble in node.troubles()]
        self._tell("checking …")
        verdict = await blocking(check, history)
        if not (verdict.valid and not troubles):
            save(self._directory / "history", history)
        return self._result(verdict, history, troubles)

    @contextmanager
    def _crowds(self, cluster: Cluster, links: Links) -> Iterator[list[Process]]:
        """Two halves of the clients, and some more behind `links`."""
        most = self._plan.clients_per_room
        specs = [
            self._spec(1, cluster, cluster.ports, "127.0.0.1", list(range(1, most + 1, 2)), WANDERERS),
            self._spec(2, cluster, cluster.ports, HALF_OPEN_SOURCE, list(range(2, most + 1, 2)), WANDERERS),
            self._spec(3, cluster, links.ports, "127.0.0.1", [behind_a_link(most)], 0),
        ]
        with ExitStack() as stack:
            log = stack.enter_context((self._directory / "crowds.log").open("wb"))
            found = []
            for spec in specs:
                found.append(Process(spec, log))
                stack.callback(found[-1].close)
            yield found

    def _spec(
        self, number: int, cluster: Cluster, ports: list[int], source: str, members: list[int], wanderers: int
    ) -> Spec:
        return Spec(
            ports=ports,
            secret=SECRET,
            name=f"crowd {number}",
            source=source,
            rooms=self._plan.rooms,
            numbers=members,
            others=OTHERS + 1000 * number,
            wanderers=wanderers,
            outsiders=2,
            silence=SILENCE,
            seed=self._plan.seed,
            epoch_proves=cluster.postgres is not None,
            failovers=cluster.kind == "standby",
        )

    async def _phase(
        self, name: str, cluster: Cluster, crowds: list[Process], workload: Workload, links: Links
    ) -> None:
        phase = Phase(name, monotonic())
        before = self._counted(cluster.nodes)
        for node in cluster.nodes:
            node.peak = 0
        attempts = len(workload.attempts)
        for one in crowds:
            await blocking(one.do, "load")
        if self._presence is not None:
            self._presence.load()
        async with trio.open_nursery() as nursery:
            await nursery.start(workload.run, FINISH_SECONDS)
            field = Field(
                cluster, workload, links, crowds[1].pid, self._plan.seconds, self._dice,
                phase.notes, self._troubles, self._past,
            )  # fmt: skip
            await nemesis.strike(name, field)
            phase.healed = monotonic()
            for node in cluster.nodes:
                node.ended += node.exit_code is not None
            await trio.sleep(1.0)  # it must work again, under load
            workload.stop()
            for one in crowds:
                await blocking(one.do, "quiet")
        phase.settled = await self._settle(cluster, crowds)
        if self._presence is not None:
            phase.presence = await self._presence.settle(backend=not self._past)
        phase.ended = monotonic()
        _sum_up(phase, workload, attempts)
        phase.repaired, phase.started_over = (
            now - then for now, then in zip(self._counted(cluster.nodes), before, strict=True)
        )
        phase.peak = max(node.peak for node in cluster.nodes)
        self._phases.append(phase)
        settled = "not settled" if phase.settled is None else f"settled after {phase.settled:.1f} s"
        notes = f" ({', '.join(phase.notes)})" if phase.notes else ""
        if phase.presence is not None:
            settled += f", presence after {phase.presence:.1f} s"
        self._tell(f"{name}: {phase.acknowledged:,} acknowledged, {settled}{notes}")

    async def _settle(self, cluster: Cluster, crowds: Sequence[Process]) -> float | None:
        """Seconds until every client has the head of each of its rooms; None if that takes too long."""
        started = monotonic()
        while monotonic() - started < self._plan.patience:
            found = await blocking(heads, cluster.rows)
            behind = []
            for one in crowds:
                for room, all_held in (await blocking(one.report)).held.items():
                    head, mark = found.get(room, (0, None))
                    for held, whose in all_held:
                        if held.cursor != head or (held.mark != mark and None not in (held.mark, mark)):
                            behind.append(f"room {room}: {whose} has {held}, the database {head}, {mark}")
            if not behind:
                return monotonic() - started
            await trio.sleep(0.05)
        for line in behind[:BEHIND_SHOWN]:
            self._tell(f"  {line}")
        return None

    async def _look(self, nodes: Sequence[Node]) -> None:
        backends = {node.name: Backend() for node in nodes}
        while True:
            for node in nodes:
                await blocking(node.look)
                try:
                    with trio.fail_after(LOOK_EVERY):
                        node.count(await backends[node.name].text(node.api_port, "/metrics"))
                except (OSError, trio.TooSlowError, trio.BrokenResourceError):
                    pass  # it is down or frozen
            await trio.sleep(LOOK_EVERY)

    @staticmethod
    def _counted(nodes: Sequence[Node]) -> tuple[int, int]:
        return sum(node.repairs for node in nodes), sum(node.restarts_over for node in nodes)

    async def _history(
        self, cluster: Cluster, crowds: Sequence[Process], workload: Workload, settled: float
    ) -> History:
        results = [
            await blocking(one.result, self._directory / f"crowd-{number}")
            for number, one in enumerate(crowds, 1)
        ]
        attempts = workload.attempts + [a for result in results for a in result.attempts]
        clients = [client for result in results for client in result.clients]
        pictures = self._presence.pictures if self._presence is not None else []
        return History(attempts, clients, await blocking(contents, cluster.rows), settled, self._past, pictures)

    def _result(self, verdict: Verdict, history: History, troubles: list[str]) -> Result:
        for at in verdict.gone:
            self._phase_at(at).gone += 1
        for anomaly in verdict.anomalies:
            phase = self._phase_at(anomaly.at)
            phase.anomalies[anomaly.name] = phase.anomalies.get(anomaly.name, 0) + 1
        return Result(self._plan, self._phases, verdict, troubles, verdict.received)

    def _phase_at(self, at: float) -> Phase:
        return next((phase for phase in self._phases if at <= phase.ended), self._phases[-1])


def behind_a_link(most: int) -> int:
    """The number of a room's member that comes through `links`: one who is neither restless nor removed."""
    return next(number for number in range(max(most, *FLAPPED) + 1, 2**31) if number % 10)


def _sum_up(phase: Phase, workload: Workload, first: int) -> None:
    """The posters' part. Unavailable: the longest time without any acknowledgement while they were posting."""
    mine = workload.attempts[first:]
    phase.acknowledged = sum(a.outcome is Outcome.OK for a in mine)
    phase.unknown = sum(a.outcome is Outcome.INFO for a in mine)
    posts = [a for a in mine if a.kind is Kind.POST and a.outcome is Outcome.OK]
    moments = sorted([phase.began, *(a.ended for a in posts)])
    phase.unavailable = max((after - before for before, after in pairwise(moments)), default=0)
    took = sorted(a.ended - a.invoked for a in posts)
    if took:
        phase.median, phase.p99 = took[len(took) // 2], took[len(took) * 99 // 100]
