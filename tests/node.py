"""Where Node is: the one that Playwright brings along, so that every machine tests with the same."""

from __future__ import annotations

import subprocess
from importlib.util import find_spec
from pathlib import Path

_playwright = find_spec("playwright")
_origin = _playwright.origin if _playwright else None
NODE = str(Path(_origin).parent / "driver" / "node") if _origin else "node"


def run_script(source: str, seconds: float) -> str:
    """Run a module; returns what it printed."""
    command = [NODE, "--input-type=module", "--eval", source]
    run = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout
