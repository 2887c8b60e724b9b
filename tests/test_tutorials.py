"""The tutorials, run from their Markdown: its files as they stand there, a real chatd, two people in Chromium.

Only addresses are replaced, and what a reader installs with pip is what these tests have installed.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.services import free_port
from tests.test_docs import DOCS
from tests.test_page import BrowserContext, Page, browser, expect  # noqa: F401  # a fixture
from tools.reference import ROOT

NAMES = ["flask", "fastapi", "express"]
TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.MULTILINE | re.DOTALL)
PATIENCE = 120.0  # seconds: the machine may be busy


def titled(name: str) -> dict[str, str]:
    """The blocks of a tutorial that have a title: its files, and what is typed into which terminal."""
    return dict(TITLED.findall((DOCS / f"tutorial-{name}.md").read_text()))


class Application:
    """A tutorial's application, in the directory that its reader makes."""

    def __init__(self, name: str, directory: Path, daemon: Daemon) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.directory = directory / "chat"
        self._addresses = {
            "127.0.0.1:8080": f"127.0.0.1:{daemon.api_port}",
            ":6001/": f":{daemon.hub_port}/",
            "5000": str(self.port),
            "~/chatd": str(ROOT),
            ".venv/bin/": f"{Path(sys.executable).parent}/",
        }
        blocks = titled(name)
        self._type(blocks.pop("Prepare"), directory)
        (self.directory / "token").write_text(daemon.token)
        del blocks["Terminal 1"]
        command = self._replaced(blocks.pop("Terminal 2"))
        for file, text in blocks.items():
            (self.directory / file).write_text(self._replaced(text))
        with (self.directory / "log").open("wb") as log:
            # `exec`: the shell becomes the application, so that ending it leaves nothing behind.
            self._process = subprocess.Popen(
                ["sh", "-c", f"exec {command}"], cwd=self.directory, stdout=log, stderr=log
            )
        self._wait()

    def _type(self, text: str, directory: Path) -> None:
        lines = [line for line in self._replaced(text).splitlines() if not line.startswith("python3 -m venv")]
        subprocess.run(["sh", "-ec", "\n".join(lines)], cwd=directory, check=True, timeout=300)

    def _replaced(self, text: str) -> str:
        for known, ours in self._addresses.items():
            text = text.replace(known, ours)
        return text

    def _wait(self) -> None:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            assert self._process.poll() is None, self.log
            try:
                with urllib.request.urlopen(self.url, timeout=5):
                    return
            except OSError:
                time.sleep(0.05)
        raise AssertionError(f"The application did not start:\n{self.log}")

    @property
    def log(self) -> str:
        return (self.directory / "log").read_text()

    def close(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.mark.service
@pytest.mark.parametrize("name", NAMES)
def test_two_people_talk(
    name: str,
    browser: BrowserContext,  # noqa: F811
    tmp_path: Path,
) -> None:
    (tmp_path / "daemon").mkdir()
    daemon = Daemon(tmp_path / "daemon", rooms__access="members")
    application = None
    try:
        daemon.start()
        application = Application(name, tmp_path, daemon)
        ada, bob = enter(browser, application, "Ada"), enter(browser, application, "Bob")
        talk(ada, bob, daemon)
    finally:
        if application is not None:
            application.close()
        daemon.close()


def enter(browser: BrowserContext, application: Application, name: str) -> Page:  # noqa: F811
    """Log in, in a window that shares no cookies with others."""
    assert browser.browser is not None
    page = browser.browser.new_context().new_page()
    page.set_default_timeout(PATIENCE * 1000)
    page.goto(application.url)
    page.get_by_role("button", name=f"I am {name}").click()
    expect(page.locator("#state")).to_have_text("online", timeout=PATIENCE * 1000)
    return page


def talk(ada: Page, bob: Page, daemon: Daemon) -> None:
    def say(page: Page, text: str) -> None:
        page.locator("#text").fill(text)
        page.get_by_role("button", name="Send").click()

    def both_show(*lines: str) -> None:
        for page in (ada, bob):
            expect(page.locator("#messages li")).to_have_text([*lines], timeout=PATIENCE * 1000)

    joined = ["Ada has joined", "Bob has joined"]
    both_show(*joined)
    say(ada, "Lunch?")
    both_show(*joined, "Ada: Lunch?")
    bob.locator("#text").press_sequentially("Y")
    expect(ada.locator("#typing")).to_have_text("Bob is typing …", timeout=PATIENCE * 1000)
    say(bob, "Yes <b>!</b>")
    both_show(*joined, "Ada: Lunch?", "Bob: Yes <b>!</b>")
    daemon.stop()
    expect(ada.locator("#state")).not_to_have_text("online", timeout=PATIENCE * 1000)
    say(ada, "still there?")
    daemon.start()
    both_show(*joined, "Ada: Lunch?", "Bob: Yes <b>!</b>", "Ada: still there?")
    ada.reload()
    both_show(*joined, "Ada: Lunch?", "Bob: Yes <b>!</b>", "Ada: still there?")


def test_the_page_is_the_same_in_each_tutorial() -> None:
    pages = [
        {file: text for file, text in titled(name).items() if file.startswith("static/")} for name in NAMES
    ]
    assert pages[0].keys() == {"static/index.html", "static/chat.js"}
    assert pages[0] == pages[1] == pages[2]


def test_the_tutorials_copy_what_there_is() -> None:
    """All modules of chatd.js, and no other file."""
    copied = {re.search(r"cp ~/chatd/(\S+) static/", titled(name)["Prepare"])[1] for name in NAMES}  # type: ignore[index]
    assert len(copied) == 1
    files = list(ROOT.glob(copied.pop()))
    assert {"chatd.js"} < {file.name for file in files}
    for file in files:
        imported = re.findall(r'from "\./([\w-]+\.js)"', file.read_text())
        assert set(imported) <= {file.name for file in files}
