"""`python -m tests.faults`: breaks what can break around chatd and checks that its guarantees held.

It runs in namespaces of its own, which end with it: network, mounts, processes.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import msgspec
import trio

from tests.faults import nemesis
from tests.faults.cluster import KINDS
from tests.faults.report import table
from tests.faults.runner import Plan, Result, Run

INSIDE = "CHATD_FAULTS_INSIDE"
os.environ["PATH"] += ":/usr/sbin:/sbin"  # where nft and ip are, also for who is not root


def _enter_namespaces() -> None:
    """Start over as the first process of namespaces of our own."""
    missing = [name for name in ("unshare", "nft", "ip") if shutil.which(name) is None]
    if missing:
        sys.exit(f"Missing: {', '.join(missing)}. `make test` installs util-linux, nftables and iproute2.")
    rights = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare = ["unshare", *rights, "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
    os.environ[INSIDE] = "1"
    os.execvp("unshare", [*unshare, sys.executable, "-m", "tests.faults", *sys.argv[1:]])


@click.command(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option("--cluster", "kinds", type=click.Choice(KINDS), multiple=True, help="All of them if not given.")
@click.option("--fault", "faults", multiple=True, help="One, or a pair: 'one + other'; repeatable.")
@click.option("--pairs", default=0, help="So many pairs of faults at once, at random, on each cluster.")
@click.option("--seconds", default=20.0, show_default=True, help="That a fault lasts.")
@click.option("--rooms", default=20, show_default=True)
@click.option("--clients", default=50, show_default=True, help="In each room.")
@click.option("--rate", default=0, help="So many messages a second in batches, on top of four posters.")
@click.option(
    "--presence/--no-presence", default=True, help="Wait until who is online shows truly, up to 15 s."
)
@click.option("--patience", default=40.0, show_default=True, help="Seconds for clients to catch up after it.")
@click.option("--seed", type=int, help="Of all that is random; printed.")
@click.option("--bug", help="Plant a bug in chatd: the run must fail.")
@click.option("--json", "report", type=click.Path(path_type=Path), help="Write the results here too.")
@click.option("--keep", type=click.Path(path_type=Path), help="Work in this directory, and leave it.")
def main(
    kinds: tuple[str, ...],
    faults: tuple[str, ...],
    pairs: int,
    seconds: float,
    rooms: int,
    clients: int,
    rate: int,
    presence: bool,
    patience: float,
    seed: int | None,
    bug: str | None,
    report: Path | None,
    keep: Path | None,
) -> None:
    """Break what can break around chatd, under load, and check that its guarantees held."""
    if unknown := {one for name in faults for one in name.split(" + ")} - set(nemesis.FAULTS):
        raise click.BadParameter(f"there is no {', '.join(unknown)}. There are: {', '.join(nemesis.FAULTS)}.")
    seed = random.randrange(10**6) if seed is None else seed
    results: list[Result] = []
    for kind in kinds or KINDS:
        dice = random.Random(seed)
        phases = [name for name in faults or nemesis.faults_of(kind) if nemesis.fits(name, kind)]
        phases += nemesis.pairs_of(kind, dice, pairs)
        if phases:
            click.echo(
                f"\n{kind}: {rooms * clients:,} clients in {rooms} rooms, {seconds:.0f} s a fault, seed {seed}"
            )
            plan = Plan(kind, phases, seconds, seed, rooms, clients, patience, bug, rate, presence)
            results.append(_run(plan, keep))
            click.echo("\n" + "\n".join(table(results[-1])))
        if report:  # after each cluster: a run that is ended early has told something
            report.write_bytes(msgspec.json.encode(results))
    sys.exit(0 if all(result.valid for result in results) else 1)


def _run(plan: Plan, keep: Path | None) -> Result:
    def tell(line: str) -> None:
        click.echo(f"  {line}")

    directory = Path(tempfile.mkdtemp(prefix="chatd-faults-", dir=keep))
    directory.chmod(0o755)
    result = trio.run(Run(plan, directory, tell).run)
    if keep or not result.valid:
        click.echo(f"  logs and history: {directory}")
    else:
        shutil.rmtree(directory)
    return result


if __name__ == "__main__":
    if os.environ.get(INSIDE) is None:
        _enter_namespaces()
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    main(prog_name="python -m tests.faults")
