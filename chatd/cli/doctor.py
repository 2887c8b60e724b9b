"""`doctor`: checks an installation for mistakes that happen in practice."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import click
import trio

from chatd import config
from chatd.cli.group import DEFAULT_FILE, main
from chatd.core.errors import ConfigError
from chatd.observe import logs
from chatd.ops import checks
from chatd.ops.finding import Case, Finding, Level, examine, problem

COLOURS = {Level.OK: "green", Level.WARNING: "yellow", Level.PROBLEM: "red"}
WIDTH = 18  # characters of the column with the subject


@main.command()
@click.option(
    "--config",
    "path",
    type=click.Path(path_type=Path),
    envvar="CHATD_CONFIG",
    help="The configuration to read.",
)
@click.option(
    "--url",
    default="",
    help="Check the proxy, too. This is the URL of the clients, such as wss://chat.example.com/ws.",
)
@click.option(
    "--write", is_flag=True, help="Send a message that is stored and deleted again, instead of an event."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, for programs.")
def doctor(path: Path | None, url: str, write: bool, as_json: bool) -> None:
    """Check the installation for common mistakes, and say how to correct them.

    Run it on the daemon's machine, as the daemon's user, with the daemon's configuration, but outside the
    sandbox of its unit. Exit codes: 0 all is well, 1 there are warnings, 2 there are problems.

    It leaves no lasting changes. For the round trip it sends an event to the reserved room 9007199254740991
    and the user of the same number. Nobody else gets it, and chatd does not store it. A webhook about presence
    reports that user. With --write it sends a message and deletes it. The deleted message stays in that room.
    """
    if path is None and DEFAULT_FILE.is_file():
        path = DEFAULT_FILE
    logs.configure("error", "auto")
    found = trio.run(_examine, path, _websocket_url(url), write, as_json)
    worst = max((finding.level for finding in found), default=Level.OK)
    if as_json:
        findings = [asdict(finding) | {"level": finding.level.name.lower()} for finding in found]
        click.echo(json.dumps({"worst": worst.name.lower(), "findings": findings}, indent=1))
    else:
        click.echo(f"\n{_summary(found)}")
    sys.exit(worst)


async def _examine(path: Path | None, url: str, write: bool, silent: bool) -> list[Finding]:
    found: list[Finding] = []

    def note(finding: Finding) -> None:
        found.append(finding)
        if not silent:
            _show(finding)

    try:
        case, wanted = Case(config.load(path), path, url, write), checks.ALL
    except ConfigError as error:
        for mistake in error.mistakes:
            note(problem("configuration", mistake, "Correct it. The other checks need a valid configuration."))
        case, wanted = Case(config.Config()), checks.ALWAYS
    async for finding in examine(case, wanted):
        note(finding)
    return found


def _websocket_url(url: str) -> str:
    """Return a ws:// or wss:// URL for one that begins with http(s)://, or that has no scheme."""
    if url.startswith(("https://", "http://")):
        return url.replace("http", "ws", 1)
    return url if not url or url.startswith(("ws://", "wss://")) else f"wss://{url}"


def _show(finding: Finding) -> None:
    level = click.style(f"{finding.level.name.lower():<8}", fg=COLOURS[finding.level])
    click.echo(f"{level} {finding.subject:<{WIDTH}} {finding.found}")
    if finding.advice:
        click.echo(f"{'':<{9 + WIDTH}} → {finding.advice}")


def _summary(found: list[Finding]) -> str:
    problems = sum(finding.level is Level.PROBLEM for finding in found)
    warnings = sum(finding.level is Level.WARNING for finding in found)
    if not problems and not warnings:
        return f"{len(found)} findings, all is well."
    return f"{len(found)} findings: {_count(problems, 'problem')}, {_count(warnings, 'warning')}."


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
