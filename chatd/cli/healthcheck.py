"""`healthcheck`: whether the daemon on this machine works, for the health probes of containers."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from chatd import config
from chatd.cli.group import main, with_config
from chatd.ops.api import ApiClient, Unreachable

WITHIN = 2.5  # seconds; less than the deadline of usual probes, so that this can report why it fails


@main.command()
@click.option(
    "--ready", is_flag=True, help="Check whether the daemon can store messages, not only whether it answers."
)
@with_config
def healthcheck(path: Path | None, ready: bool) -> None:
    """Check whether the daemon on api.bind works. Exit codes: 0 yes, 1 no.

    This is for the health probes of containers. It needs no token, and of the configuration only api.bind.
    """
    settings = config.load(path, require_token=False)
    backend = ApiClient(settings, within=WITHIN)
    try:
        answer = backend.ask("GET", "/readyz" if ready else "/healthz")
    except Unreachable as error:
        click.echo(str(error))
        sys.exit(1)
    click.echo(f"{backend.url}: {answer.json.get('status', 'this is not chatd')} ({answer.status})")
    sys.exit(answer.status != 200 or "status" not in answer.json)
