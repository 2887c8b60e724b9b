"""Where Node is: the one that Playwright brings along, so that every machine tests with the same."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

_playwright = find_spec("playwright")
_origin = _playwright.origin if _playwright else None
NODE = str(Path(_origin).parent / "driver" / "node") if _origin else "node"
