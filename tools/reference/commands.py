"""The commands for docs/commands.md, from the commands themselves: how each is called, and its options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import click

from chatd.cli import main

EVERYWHERE = ("--config", "--help", "-h, --help")  # options that all commands have


def parts() -> dict[str, str]:
    """A part for each command: `serve`, `user export` …"""
    context = click.Context(main, info_name="chatd")
    return {path: _part(command, inner) for path, command, inner in _commands(main, context)}


def _commands(group: click.Group, context: click.Context) -> Iterator[tuple[str, click.Command, click.Context]]:
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        inner = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from _commands(command, inner)
        else:
            yield inner.command_path.removeprefix("chatd "), command, inner


def _part(command: click.Command, context: click.Context) -> str:
    usage = command.get_usage(context).removeprefix("Usage: ")
    rows = [
        f"| `{names}` | {meaning} |"
        for parameter in command.get_params(context)
        if isinstance(parameter, click.Option) and (record := parameter.get_help_record(context))
        for names, meaning in [_plain(*record)]
        if not names.startswith(EVERYWHERE)
    ]
    parts = [f"```text\n{usage}\n```", inspect.cleandoc(command.help or "")]
    return "\n\n".join([*parts, "\n".join(["| option | |", "|---|---|", *rows])] if rows else parts)


def _plain(names: str, meaning: str) -> tuple[str, str]:
    """Without click's way to write types and bounds: `--keep INTEGER RANGE`, `[0<=x<=36500]`."""
    meaning = re.sub(
        r"\s*\[(?:[^\]]*; )?[\d<=x>. ]+(; required)?\]", lambda found: " Required." if found[1] else "", meaning
    )
    return re.sub(r"(INTEGER|FLOAT)( RANGE)?", "NUMBER", names), meaning
