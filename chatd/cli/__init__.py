"""The commands: the only code that prints, and the only one that ends the process with a code."""

from chatd.cli.group import main

__all__ = ["main"]
