"""How lines look, and how many there are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import structlog.testing

from chatd.observe import logs
from chatd.observe.logs import SELDOM, Recurring

SPEAK = """
import structlog
from chatd.observe import logs
logs.configure("info", "auto")
log = structlog.get_logger()
log.debug("unheard")
log.info("heard", text="a\\n<0>b\\x1b[31m")
log.error("broken")
logs.set_level("debug")
log.debug("heard now")
"""


def speak(stderr: Path, **environ: str) -> list[str]:
    with stderr.open("wb") as file:
        if environ:
            found = os.fstat(file.fileno())
            environ = {"JOURNAL_STREAM": f"{found.st_dev}:{found.st_ino}"}
        subprocess.run([sys.executable, "-c", SPEAK], stderr=file, env=os.environ | environ, check=True)
    return stderr.read_text().splitlines()


@pytest.mark.service
def test_the_journal_gets_the_level_of_each_line(tmp_path: Path) -> None:
    lines = speak(tmp_path / "log", JOURNAL_STREAM="of this file")
    assert [line[:3] for line in lines] == ["<6>", "<3>", "<7>"], "one event is one line"
    assert json.loads(lines[0][3:])["text"] == "a\n<0>b\x1b[31m"
    assert set(json.loads(lines[1][3:])) == {"event", "level", "ts"}


@pytest.mark.service
def test_elsewhere_a_line_is_json_alone(tmp_path: Path) -> None:
    lines = speak(tmp_path / "log")
    assert [json.loads(line)["event"] for line in lines] == ["heard", "broken", "heard now"]


def test_trouble_in_crowds_is_told_once_and_then_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr(logs.time, "monotonic", lambda: now)
    with structlog.testing.capture_logs() as lines:
        trouble = Recurring("database_away")
        for number in range(50):
            trouble.warn(number=number)
        now += SELDOM
        trouble.warn(number=50)
        now += SELDOM
        trouble.warn(number=51)
    found = [(line["number"], line.get("more")) for line in lines]
    assert found == [(0, None), (50, 49), (51, None)]
