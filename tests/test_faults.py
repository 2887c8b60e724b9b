"""The guarantees under faults, in a short form; and that the checker sees a bug where there is one.

Each run is a process of its own, `python -m tests.faults`, which `make faults` runs for longer. Two at a time.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.faults.nemesis import faults_of

pytestmark = pytest.mark.service

REPOSITORY = Path(__file__).parent.parent
AT_ONCE = 2
LONGEST = 600  # seconds; a quarter of it on a machine that has nothing else to do
FEW = ["--rooms", "5", "--clients", "10"]

CLUSTERS = {
    "two": ["--cluster", "two", "--seconds", "2", "--rooms", "10", "--clients", "20"],
    "sqlite": ["--cluster", "sqlite", "--seconds", "2", "--rooms", "10", "--clients", "20"],
    "small-disk": ["--cluster", "small-disk", "--seconds", "3", *FEW],
    "three": ["--cluster", "three", "--seconds", "2", *FEW],
    "standby": ["--cluster", "standby", "--seconds", "2", *FEW],
}
QUICK = ["--no-presence"]  # who is online takes ten seconds to settle: runs of their own look at it
PRESENCE = {
    "presence of two": [
        *("--cluster", "two", "--seconds", "3", *FEW),
        *(
            arg
            for name in ("kill", "restart", "freeze", "redis-pause", "postgres-freeze")
            for arg in ("--fault", name)
        ),
    ],
    "presence of one": [
        *("--cluster", "sqlite", "--seconds", "3", *FEW),
        *(arg for name in ("kill", "restart", "slow-clients", "lock") for arg in ("--fault", name)),
    ],
}
FREEZE = ["--cluster", "two", "--fault", "freeze"]
# By the bug: what the checker must say, and where the bug shows.
BUGS = {
    "ack-before-commit": ("lost-write", ["--cluster", "sqlite", "--fault", "kill", "--seconds", "6", *FEW]),
    "no-idempotency": ("duplicate-write", [*FREEZE, "--seconds", "7", "--rate", "100", *FEW]),
    "hole-in-the-log": ("seq-hole", ["--cluster", "sqlite", "--fault", "calm", "--seconds", "3", *FEW]),
    "deliver-twice": ("duplicate-receive", ["--cluster", "sqlite", "--fault", "calm", "--seconds", "3", *FEW]),
    "no-buffering": ("skip", ["--cluster", "sqlite", "--fault", "calm", "--seconds", "5", *FEW]),
    "no-hole-repair": ("unseen", ["--cluster", "two", "--fault", "calm", "--seconds", "3", *FEW]),
    "no-revocation": ("leak", ["--cluster", "sqlite", "--fault", "calm", "--seconds", "4", *FEW]),
    "resume-by-number": (
        "moved-silently",
        ["--cluster", "sqlite", "--fault", "rollback", "--seconds", "3", *FEW],
    ),
    "drop-what-is-numbered-again": (
        "moved-silently",
        ["--cluster", "standby", "--fault", "pg-failover-lagging", "--seconds", "3", *FEW],
    ),
    "everybody-starts-over": (
        "needless-reset",
        ["--cluster", "sqlite", "--fault", "kill", "--seconds", "3", *FEW],
    ),
}


PRESENCE_BUGS = {
    "dead-node-stays-online": [
        *("--cluster", "two", "--fault", "calm", "--fault", "kill", "--seconds", "8", *FEW)
    ],
    # Long enough for those who leave at its end to have come, on a slow machine too.
    "nobody-is-seen-to-go": ["--cluster", "sqlite", "--fault", "calm", "--seconds", "10", *FEW],
}


class Ended:
    """A run that has ended: what it printed, and its results."""

    def __init__(self, code: int, printed: str, results: list[Any]) -> None:
        self.code, self.printed, self.results = code, printed, results


def run(directory: Path, arguments: list[str]) -> Ended:
    report = directory / "report.json"
    options = [*arguments, "--json", str(report), "--keep", str(directory)]
    ended = subprocess.run(
        [sys.executable, "-m", "tests.faults", *options],
        cwd=REPOSITORY,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=LONGEST,
    )
    results = json.loads(report.read_text()) if report.exists() else []
    return Ended(ended.returncode, ended.stdout + ended.stderr, results)


@pytest.fixture(scope="module")
def runs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The runs that the chosen tests wait for, begun together."""
    wanted = {name: [*arguments, *QUICK] for name, arguments in CLUSTERS.items()} | PRESENCE
    bugs = {bug: [*arguments, *QUICK] for bug, (_, arguments) in BUGS.items()} | PRESENCE_BUGS
    wanted |= {bug: [*arguments, "--bug", bug, "--patience", "3"] for bug, arguments in bugs.items()}
    chosen = [item.callspec.params["name"] for item in request.session.items if item.fspath == request.fspath]
    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {name: pool.submit(run, tmp_path_factory.mktemp(name), wanted[name]) for name in chosen}


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_guarantees_hold_under_every_fault(runs: dict[str, Future[Ended]], name: str) -> None:
    ended = runs[name].result()
    print(ended.printed)  # pytest shows it with the failure
    assert ended.code == 0
    (result,) = ended.results
    assert [phase["name"] for phase in result["phases"]] == faults_of(name)
    for phase in result["phases"]:
        assert phase["acknowledged"] > 10, f"{phase['name']}: nobody could post"
    assert result["verdict"]["valid"] is True
    assert result["verdict"]["anomalies"] == []
    assert result["verdict"]["received"] > 1000


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_seen(runs: dict[str, Future[Ended]], name: str) -> None:
    ended = runs[name].result()
    print(ended.printed)
    assert ended.code == 1
    (result,) = ended.results
    expected, _ = BUGS[name]
    assert result["verdict"]["valid"] is False
    assert expected in {anomaly["name"] for anomaly in result["verdict"]["anomalies"]}


@pytest.mark.parametrize("name", PRESENCE)
def test_who_is_online_shows_truly_after_every_fault(runs: dict[str, Future[Ended]], name: str) -> None:
    ended = runs[name].result()
    print(ended.printed)
    assert ended.code == 0
    (result,) = ended.results
    assert all(phase["presence"] is not None for phase in result["phases"])


@pytest.mark.parametrize("name", PRESENCE_BUGS)
def test_a_wrong_picture_of_presence_is_seen(runs: dict[str, Future[Ended]], name: str) -> None:
    ended = runs[name].result()
    print(ended.printed)
    assert ended.code == 1
    (result,) = ended.results
    assert "wrong-presence" in {anomaly["name"] for anomaly in result["verdict"]["anomalies"]}
