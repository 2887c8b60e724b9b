"""Where Node is: the one that Playwright brings along, so that every machine tests with the same."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_playwright = find_spec("playwright")
NODE = str(Path(_playwright.origin).parent / "driver" / "node") if _playwright and _playwright.origin else "node"
