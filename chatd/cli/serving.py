"""`serve`, and the commands that prepare for it: `check-config`, `migrate`."""

from __future__ import annotations

import faulthandler
import os
import sys
from functools import partial
from pathlib import Path

import click
import structlog
import trio

from chatd import config
from chatd.cli.group import main, with_config
from chatd.core.errors import DatabaseGone, OperatorError, innermost
from chatd.daemon import workers
from chatd.observe import logs
from chatd.ops import showing
from chatd.store import database

log = structlog.get_logger()


@main.command()
@click.option(
    "--demo",
    is_flag=True,
    help="Serve a chat page and open rooms, with the token `secret`, on this machine only.",
)
@with_config
def serve(path: Path | None, demo: bool) -> None:
    """Run the daemon until SIGTERM or Ctrl-C."""
    faulthandler.enable()  # prints where a process hangs that systemd's watchdog ends with SIGABRT

    origins: config.Origins = {}

    def read() -> config.Config:
        return workers.share(config.load(path, demo=demo, origins=origins))

    settings = read()
    logs.configure(settings.logs.level, settings.logs.format)
    if not workers.is_worker():
        _log_original_names(origins)
    store = database.open_store(settings.database)
    greets = demo and not workers.is_worker()  # the workers' parent prints the welcome
    on_ready = partial(_welcome, settings) if greets else lambda: None
    try:
        if settings.server.workers > 1 and not workers.is_worker():
            store.close()  # it was opened to find mistakes, to migrate, and to create what the workers share
            sys.exit(trio.run(partial(workers.run, settings, read, on_ready=on_ready)))
        from chatd.daemon import (
            lifecycle,  # imported here, because Quart and Hypercorn take half a second
        )

        trio.run(partial(lifecycle.run, settings, store, read, on_ready=on_ready))
    except* DatabaseGone as gone:
        # Exit without closing the store: SQLite would delete the log by its name, and that log may belong to
        # another file by now, which another process has open.
        click.echo(str(_first(gone)), err=True)
        os._exit(1)
    except* OperatorError as group:
        raise _first(group) from None
    finally:
        store.close()


@main.command("check-config")
@click.option("--demo", is_flag=True, help="Check it for `chatd serve --demo`.")
@click.option("--show", is_flag=True, help="Print each value, without secrets, and where it comes from.")
@click.option(
    "--no-credentials", is_flag=True, help="Do not read systemd's credentials, and do not require a token."
)
@with_config
def check_config(path: Path | None, demo: bool, show: bool, no_credentials: bool) -> None:
    """Report every mistake in the configuration. The exit code is 78 if there is one."""
    environ = {name: value for name, value in os.environ.items() if name != config.CREDENTIALS}
    origins: config.Origins = {}
    settings = config.load(
        path,
        environ if no_credentials else None,
        demo=demo,
        require_token=not no_credentials,
        origins=origins,
    )
    if show:
        click.echo(showing.as_toml(settings, origins))
        return
    place = "PostgreSQL" if settings.database.url.startswith("postgres") else "SQLite"
    bus = "Redis" if settings.redis.url else "no Redis"
    origin = path or "defaults and environment"
    click.echo(
        f"{origin}: valid. API on {settings.api.bind}, WebSocket on {settings.hub.bind}, {place}, {bus}."
    )


@main.command()
@with_config
def migrate(path: Path | None) -> None:
    """Migrate the database's schema to this version. For SQLite `chatd serve` does this when it starts."""
    settings = config.load(path, require_token=False)
    logs.configure("warning", settings.logs.format)
    before, after = database.migrate(settings.database)
    if before == after:
        click.echo(f"The schema is already at version {after}.")
    else:
        before = f"version {before}" if before else "an empty database"
        click.echo(f"The schema was migrated from {before} to version {after}.")


def _log_original_names(origins: config.Origins) -> None:
    """Log which options come from variables with the original names, because such a variable may be meant for
    another program: REDIS_HOST alone switches chatd to Redis.
    """
    for (section, key), name in origins.items():
        if name in config.ORIGINAL_NAMES:
            option = f"{section}.{key}"
            log.info("original_name_used", variable=name, option=option, advice=f"set {option} instead")


def _first(group: BaseExceptionGroup[Exception]) -> OperatorError:
    error = innermost(group)
    assert isinstance(error, OperatorError)
    return error


def _welcome(settings: config.Config) -> None:
    _, api_port = config.split_bind(settings.api.bind)
    _, hub_port = config.split_bind(settings.hub.bind)
    click.echo(
        f"""
  The chat page:   {click.style(f"http://127.0.0.1:{api_port}/", bold=True)}
                   Open it in two windows, and choose another user in the second.

  Post a message as a backend does, from another terminal:

curl -X POST http://localhost:{api_port}/api/ws/messages -H "Content-Type: application/json" \\
  -H "Accept: application/json" -H "X-Internal-Token: {settings.api.internal_token}" \\
  -d '{{"conversation_id":1,"sender_id":1,"content":"Hello"}}'

  WebSocket clients connect to ws://127.0.0.1:{hub_port}/ws. Ctrl-C ends the demo.
"""
    )
