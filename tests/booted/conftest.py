"""The machine, booted once for all; what it measured is told at the end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator

import pytest

from tests.booted.machine import Machine, why_not

Tell = Callable[[str], None]
_figures: list[str] = []


@pytest.fixture(scope="session")
def machine() -> Iterator[Machine]:
    if reason := why_not():
        pytest.skip(f"systemd cannot be booted here: {reason}")
    # Ended like this it tidies up, too, as with Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Machine() as booted:
        booted.run("systemctl", "enable", "--now", "chatd")
        yield booted


@pytest.fixture
def tell() -> Tell:
    """Keep a figure, for whoever reads the end of the run."""
    return _figures.append


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _figures:
        terminalreporter.section("measured")
        for line in _figures:
            terminalreporter.line(line)
