"""chatd.js by itself, in Node: against a scripted server, with the clock in the test's hands.

The tests are in `tests/web/*.test.mjs`. Node is the one that Playwright brings along.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.node import NODE

WEB = Path(__file__).parent / "web"
NAME = re.compile(r'^\s*test\("([^"]+)"', re.MULTILINE)
CASES = [
    (file.name, name) for file in sorted(WEB.glob("*.test.mjs")) for name in NAME.findall(file.read_text())
]


@pytest.fixture(scope="module")
def verdicts() -> dict[tuple[str, str], str]:
    """By file and name of a test: "ok", or what Node says of it. All are run at once: each is short."""
    found = {}
    for file in dict(CASES):
        command = [NODE, "--expose-gc", "--test", "--test-reporter=tap", str(WEB / file)]
        run = subprocess.run(
            command, capture_output=True, text=True, timeout=120, env=os.environ | {"NO_COLOR": "1"}
        )
        parts = re.split(r"^ *(ok|not ok) \d+ - (.+)$", run.stdout, flags=re.MULTILINE)
        for verdict, name, details in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
            found[file, name.strip()] = "ok" if verdict == "ok" else details + run.stderr
    return found


@pytest.mark.parametrize(("file", "name"), CASES)
def test_chatd_js(verdicts: dict[tuple[str, str], str], file: str, name: str) -> None:
    verdict = verdicts.get((file, name), "It did not run.")
    assert verdict == "ok", verdict
