"""The tour sees every event and every route, on one daemon and on two nodes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.service


@pytest.mark.parametrize("cluster", ["one", "two"])
def test_nothing_is_left_out(cluster: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-m", "tests.tour", cluster],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr
    assert ended.stdout.endswith("Not seen: nothing.\n")
