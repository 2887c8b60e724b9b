"""The group of all commands, and what they share: the option `--config`, and the reports of errors."""

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

# The module of each command. It is imported only when the command is used: SQLAlchemy, JWTs and trio take half
# a
# second to import, and a health check runs every few seconds.
HOMES = {
    "serve": "serving",
    "check-config": "serving",
    "migrate": "serving",
    "token": "token",
    "backup": "data",
    "restore": "data",
    "prune": "data",
    "import": "importing",
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
            import_module(f"chatd.cli.{HOMES[name]}")  # the module adds its command to `main`
        return super().get_command(ctx, name)


def with_config(command: Command) -> Command:
    """Add `--config` to a command, and report an OperatorError as a sentence and an exit code."""

    @click.option(
        "--config",
        "path",
        type=click.Path(path_type=Path),
        envvar="CHATD_CONFIG",
        help="The file to read; by default ./chatd.toml if it exists. The environment takes precedence.",
    )
    @wraps(command)
    def wrapped(path: Path | None, **options: Any) -> None:
        if path is None and DEFAULT_FILE.is_file():
            path = DEFAULT_FILE
        try:
            command(path, **options)
        except ConfigError as error:
            click.echo(click.style("The configuration has mistakes:", bold=True), err=True)
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
    """A realtime chat daemon that delivers messages once, in order, without loss.

    Try it with: chatd serve --demo
    """
