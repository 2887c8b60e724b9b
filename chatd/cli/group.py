"""The group of all commands, and what they have in common: the configuration, and how a mistake is told."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from chatd import __version__
from chatd.core.errors import ConfigError, OperatorError

DEFAULT_FILE = Path("chatd.toml")

Command = Callable[..., None]

# Which module of this package has a command. It is imported when the command is asked for: SQLAlchemy, JWTs and
# trio take half a second, and a health check runs every few seconds.
HOMES = {
    "serve": "serving",
    "check-config": "serving",
    "migrate": "serving",
    "token": "token",
    "backup": "data",
    "restore": "data",
    "prune": "data",
    "user": "data",
    "doctor": "doctor",
    "healthcheck": "healthcheck",
    "send": "room",
    "tail": "room",
}


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted({*HOMES, *super().list_commands(ctx)})

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name in HOMES:
            import_module(f"chatd.cli.{HOMES[name]}")  # adds it
        return super().get_command(ctx, name)


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


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="chatd")
def main() -> None:
    """A realtime chat daemon: messages in order, once, and none lost.

    Try it with: chatd serve --demo
    """
