"""The commands. Only this package prints and sets exit codes."""

from chatd.cli.group import main

__all__ = ["main"]
