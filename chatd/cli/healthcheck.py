"""`healthcheck`: whether the daemon beside it is well, for containers."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from chatd import config
from chatd.cli.group import main, with_config
from chatd.ops.api import ApiClient, Unreachable

WITHIN = 2.5  # seconds, less than the probe's own patience: its word is worth more than SIGKILL


@main.command()
@click.option(
    "--ready", is_flag=True, help="Ask whether it can store messages, and not only whether it answers."
)
@with_config
def healthcheck(path: Path | None, ready: bool) -> None:
    """Ask the daemon on api.bind whether it is well. Exit codes: 0 yes, 1 no.

    It is for containers and other probes. It needs no token, and of the configuration only api.bind.
    """
    settings = config.load(path, require_token=False)
    backend = ApiClient(settings, within=WITHIN)
    try:
        answer = backend.ask("GET", "/readyz" if ready else "/healthz")
    except Unreachable as error:
        click.echo(str(error))
        sys.exit(1)
    click.echo(f"{backend.url}: {answer.json.get('status', 'this is no chatd')} ({answer.status})")
    sys.exit(answer.status != 200 or "status" not in answer.json)
