"""The commands: the only code that prints, and the only one that ends the process with a code."""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable
from functools import partial, wraps
from pathlib import Path
from typing import Any

import click
import trio

from chatd import __version__, config, logs, workers
from chatd.auth.tokens import Tokens
from chatd.errors import ConfigError, Forbidden, OperatorError
from chatd.limits import MAX_ID
from chatd.store import database

DEFAULT_FILE = Path("chatd.toml")

Command = Callable[..., None]


def with_config(command: Command) -> Command:
    """Give a command `--config`, and turn what an operator can mend into a sentence and an exit code."""

    @click.option(
        "--config",
        "path",
        type=click.Path(path_type=Path),
        envvar="CHATD_CONFIG",
        help="The file to read; chatd.toml in this directory if there is one. The environment wins over it.",
    )
    @wraps(command)
    def wrapped(path: Path | None, **options: Any) -> None:
        if path is None and DEFAULT_FILE.is_file():
            path = DEFAULT_FILE
        try:
            command(path, **options)
        except ConfigError as error:
            click.echo(click.style("The configuration is not right:", bold=True), err=True)
            for mistake in error.mistakes:
                click.echo(f"  {mistake}", err=True)
            sys.exit(error.exit_code)
        except OperatorError as error:
            click.echo(str(error), err=True)
            sys.exit(error.exit_code)

    return wrapped


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="chatd")
def main() -> None:
    """A realtime chat daemon: what your backend posts, everybody in the room has, in order, once.

    \b
    Try it:      chatd serve --demo
    Deploy it:   chatd check-config && chatd migrate && chatd serve
    """


@main.command()
@click.option(
    "--demo", is_flag=True, help="On this machine alone: a chat page, open rooms, the token `secret`."
)
@with_config
def serve(path: Path | None, demo: bool) -> None:
    """Run the daemon until SIGTERM or Ctrl-C."""
    faulthandler.enable()  # systemd's watchdog ends a stuck process with SIGABRT: say where it was stuck
    settings = config.load(path, demo=demo)
    logs.configure(settings.logs.level, settings.logs.format)
    store = database.open_store(settings.database)
    greets = demo and not workers.is_worker()  # the parent greets for all
    on_ready = partial(_welcome, settings) if greets else lambda: None
    try:
        if settings.server.workers > 1 and not workers.is_worker():
            store.close()  # opened for its mistakes, its migrations, and what is made once for all workers
            sys.exit(trio.run(partial(workers.run, settings, on_ready=on_ready)))
        from chatd import daemon  # Quart and Hypercorn take half a second that the other commands need not pay

        trio.run(partial(daemon.run, settings, store, on_ready=on_ready))
    except* OperatorError as group:
        raise _first(group) from None
    finally:
        store.close()


@main.command("check-config")
@click.option("--demo", is_flag=True, help="Check it for `chatd serve --demo`.")
@with_config
def check_config(path: Path | None, demo: bool) -> None:
    """Report every mistake in the configuration.

    The exit code is 78 if there is one.
    """
    settings = config.load(path, demo=demo)
    place = "PostgreSQL" if settings.database.url.startswith("postgres") else "SQLite"
    bus = "Redis" if settings.redis.url else "no Redis"
    origin = path or "defaults and environment"
    click.echo(f"{origin}: fine. API on {settings.api.bind}, WebSocket on {settings.hub.bind}, {place}, {bus}.")


@main.command()
@with_config
def migrate(path: Path | None) -> None:
    """Bring the database's schema to this version. SQLite does it by itself at start."""
    settings = config.load(path, require_token=False)
    logs.configure("warning", settings.logs.format)
    before, after = database.migrate(settings.database)
    if before == after:
        click.echo(f"The schema is at version {after} already.")
    else:
        click.echo(f"The schema went from {before or 'nothing'} to version {after}.")


@main.command()
@click.argument("user_id", type=click.IntRange(1, MAX_ID))
@click.option("--ttl", type=click.IntRange(1), help="Seconds it is valid; auth.token_ttl if not given.")
@click.option(
    "--room", "rooms", type=click.IntRange(1, MAX_ID), multiple=True, help="A room it opens; repeatable."
)
@with_config
def token(path: Path | None, user_id: int, ttl: int | None, rooms: tuple[int, ...]) -> None:
    """Print a token for a user, to try things with."""
    settings = config.load(path, require_token=False)
    logs.configure("warning", settings.logs.format)
    secret = settings.auth.secret
    if not secret:
        database.require(settings.database)
        store = database.open_store(settings.database)
        secret = store.token_secret
        store.close()
    try:
        issued = Tokens(secret, settings.auth).issue(user_id, ttl or settings.auth.token_ttl, rooms or None)
    except Forbidden as error:
        raise OperatorError(str(error)) from None
    click.echo(issued)


def _first(group: BaseExceptionGroup[OperatorError]) -> OperatorError:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, OperatorError)
    return error


def _welcome(settings: config.Config) -> None:
    _, api_port = config.split_bind(settings.api.bind)
    _, hub_port = config.split_bind(settings.hub.bind)
    click.echo(
        f"""
  The chat page:   {click.style(f"http://127.0.0.1:{api_port}/", bold=True)}
                   Open it twice, and be somebody else in the second window.

  Post as a backend would, from another terminal:

curl -X POST http://localhost:{api_port}/api/ws/messages -H "Content-Type: application/json" \\
  -H "Accept: application/json" -H "X-Internal-Token: {settings.api.internal_token}" \\
  -d '{{"conversation_id":1,"sender_id":1,"content":"Hello"}}'

  WebSocket clients connect to ws://127.0.0.1:{hub_port}/ws. Ctrl-C ends the demo.
"""
    )
