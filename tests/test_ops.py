"""`healthcheck`, `send`, `tail`: what an operator types, against a real daemon."""

from __future__ import annotations

import subprocess
import sys

from tests.conftest import Daemons
from tests.daemon import Daemon

HEAVY = ["trio", "sqlalchemy", "alembic", "jwt", "httpx", "redis", "quart", "structlog"]


def test_healthcheck_tells_well_from_stopped(daemons: Daemons) -> None:
    daemon = daemons()
    well = daemon.command("healthcheck", "--ready")
    assert (well.returncode, well.stdout) == (0, f"{daemon.url}: ok (200)\n")
    daemon.kill()
    gone = daemon.command("healthcheck")
    assert gone.returncode == 1
    assert gone.stdout == f"{daemon.url} does not answer: Connection refused.\n"
    assert not gone.stderr


def test_healthcheck_reaches_a_daemon_that_listens_everywhere(daemon: Daemon) -> None:
    everywhere = {"CHATD_API__BIND": f"0.0.0.0:{daemon.api_port}"}
    asked = subprocess.run([*daemon.program(), "healthcheck"], env=daemon.environ | everywhere)
    assert asked.returncode == 0


def test_healthcheck_starts_fast() -> None:
    """A probe runs every few seconds: it imports no library that takes long."""
    look = "import sys, click\ntry: from chatd.cli import main; main(['healthcheck', '--help'])\n"
    look += f"except SystemExit: print('imported:', *[name for name in {HEAVY} if name in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", look], capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1] == "imported:", ran.stdout
