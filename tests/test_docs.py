"""The documentation: what is generated from the code is current, links lead somewhere, examples are true."""

from __future__ import annotations

import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import click
import pytest

from chatd.api.examples import EXAMPLES
from chatd.cli import main
from chatd.core.errors import ChatError, Close, Final
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.test_page import BrowserContext, browser, expect  # noqa: F401  # a fixture
from tools.reference import ROOT, files

DOCS = ROOT / "docs"
PATIENCE = 120_000  # ms: the machine may be busy
TOP = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")]


# What is generated.


def test_what_is_generated_is_current() -> None:
    stale = [str(path.relative_to(ROOT)) for path, text in files().items() if path.read_text() != text]
    assert stale == [], "run `make reference`"


def test_every_command_is_documented() -> None:
    text = (DOCS / "commands.md").read_text()
    assert sorted(re.findall(r"^## `chatd ([\w -]+)`$", text, re.M)) == sorted(_names(main))


def _names(group: click.Group, before: str = "") -> Iterator[str]:
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if isinstance(command, click.Group):
            yield from _names(command, f"{before}{name} ")
        else:
            yield before + name


# The site.


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As `make docs` makes it."""
    directory = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(directory)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stdout + built.stderr
    return directory


def test_the_site_is_built_without_a_warning(site: Path) -> None:
    assert (site / "index.html").exists()
    assert '"location"' in (site / "search" / "search_index.json").read_text()


def test_every_page_is_in_the_navigation() -> None:
    listed = set(re.findall(r"(\w[\w-]*\.md)$", (ROOT / "mkdocs.yml").read_text(), re.M))
    assert listed == {path.name for path in DOCS.glob("*.md")}


class Loaded(HTMLParser):
    """What a page of the site loads by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.found.append(str(given["src"]))
        if tag == "link" and given.get("rel") != "canonical":
            self.found.append(str(given.get("href")))


def test_no_page_asks_another_host_for_anything(site: Path) -> None:
    for path in site.rglob("*.html"):
        page = Loaded()
        page.feed(path.read_text())
        assert page.found
        assert [url for url in page.found if re.match(r"(\w+:)?//", url)] == [], path


def test_the_search_finds_a_word_and_nobody_else_is_asked(site: Path, browser: BrowserContext) -> None:  # noqa: F811
    with _served(site) as url:
        page = browser.new_page()
        page.set_default_timeout(PATIENCE)
        asked: set[str] = set()
        page.on("request", lambda request: asked.add(request.url.rpartition("//")[2].partition("/")[0]))
        page.goto(url)
        page.locator(".md-search__input").click()
        page.locator(".md-search__input").press_sequentially("fencing")
        result = page.locator(".md-search-result__link").first
        expect(result).to_contain_text("Architecture", timeout=PATIENCE)
        result.click()
        expect(page).to_have_url(re.compile("architecture/"))
        page.close()
    assert asked == {url.removeprefix("http://")}


@contextmanager
def _served(directory: Path) -> Iterator[str]:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(directory)))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_links_of_the_files_at_the_top_lead_somewhere() -> None:
    for path in TOP:
        text = path.read_text()
        for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text) + re.findall(r'src(?:set)?="([^"]+)"', text):
            assert link.startswith("https://") or (path.parent / link).exists(), (path.name, link)


def test_paths_that_the_code_names_exist() -> None:
    """In comments, sentences and units: `docs/deployment.md` is where the reader is sent."""
    places = [*(ROOT / "chatd").rglob("*.py"), *(ROOT / "systemd").iterdir(), ROOT / "docker-compose.yml"]
    for path in places:
        if path.is_file():
            for named in re.findall(r"\bdocs/[\w-]+\.(?:md|conf|yml|json)", path.read_text()):
                assert (ROOT / named).exists(), (path, named)


def test_modules_that_the_documentation_names_exist() -> None:
    for path in [*DOCS.glob("*.md"), *TOP]:
        for named in re.findall(r"`([\w/]+/\w+\.(?:py|mjs|js))`", path.read_text()):
            assert (ROOT / named).exists() or (ROOT / "chatd" / named).exists(), (path, named)


# The HTTP reference.


def test_the_examples_of_the_http_reference_are_what_is_answered(daemons: Daemons) -> None:
    """On a new daemon, in their order."""
    daemon = daemons()
    assert {(method, path) for method, path, _ in _operations(daemon)} == set(EXAMPLES)
    ids = {"conversation_id": "1", "user_id": "5", "message_id": "1"}
    for (method, path), example in EXAMPLES.items():
        answer = daemon.request(method, path.format(**ids) + example.query, example.body)
        assert answer.status == 200, (method, path, answer.body)
        assert _comparable(answer.json) == _comparable(example.answer), (method, path)


def _comparable(value: Any) -> Any:
    """Times and tokens differ each time."""
    if isinstance(value, dict):
        return {key: "…" if key in ("created_at", "token") else _comparable(one) for key, one in value.items()}
    return [_comparable(one) for one in value] if isinstance(value, list) else value


def _operations(daemon: Daemon) -> Iterator[tuple[str, str, Any]]:
    for path, methods in daemon.get("/openapi.json").json["paths"].items():
        for method, operation in methods.items():
            yield method.upper(), path, operation


def test_each_reference_of_the_description_leads_to_a_schema(daemon: Daemon) -> None:
    answer = daemon.get("/openapi.json")
    named = set(re.findall(r"#/components/schemas/(\w+)", answer.body.decode()))
    assert named == set(answer.json["components"]["schemas"])
    for schema in answer.json["components"]["schemas"].values():
        assert all(field["description"] for field in schema["properties"].values())


def test_the_http_reference_is_served_to_everybody_without_a_script(daemon: Daemon) -> None:
    for path, kind in (("/docs", "text/html"), ("/docs/reference.css", "text/css")):
        answer = daemon.request("GET", path, headers={"X-Internal-Token": ""})
        assert (answer.status, answer.headers["Content-Type"]) == (200, f"{kind}; charset=utf-8")
        assert "default-src 'none'" in answer.headers["Content-Security-Policy"]
    page = daemon.get("/docs").body.decode()
    assert "<script" not in page
    assert re.findall(r'(?:src|href)="(?:https?:)?//', page) == []
    anchors, links = re.findall(r' id="([\w-]+)"', page), re.findall(r'href="#([\w-]+)"', page)
    assert len(anchors) == len(set(anchors))
    assert set(links) <= set(anchors)
    for method, path, operation in _operations(daemon):
        assert f"{method}</b> <code>{path.replace('/', '<wbr>/')}</code>" in page
        assert re.sub("`.*", "", operation["summary"]) in page


@pytest.mark.parametrize("width", [1280, 400])
def test_the_http_reference_fits_its_window(browser: BrowserContext, daemon: Daemon, width: int) -> None:  # noqa: F811
    page = browser.new_page()
    page.set_default_timeout(PATIENCE)
    page.set_viewport_size({"width": width, "height": 800})
    problems: list[str] = []
    page.on("console", lambda message: problems.append(message.text))
    page.goto(f"{daemon.url}/docs")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("section").count() > 30
    page.close()
    assert problems == []


# Errors.


def test_the_table_of_errors_has_each_code_with_its_status() -> None:
    text = (DOCS / "errors.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (\S+).*? \| (yes|no|after a refresh)", text, re.M)
    found = {code: (status, again) for code, status, again in rows}
    internal = {"superseded"}  # chatd answers nobody with it
    kinds = {kind.code: kind for kind in _subclasses(ChatError) if kind.code not in internal}
    assert set(found) == set(kinds)
    for code, (status, again) in found.items():
        assert status in (str(kinds[code].status), "–"), code
        assert (again == "yes") == kinds[code].retryable, code


def _subclasses(kind: type[ChatError]) -> Iterator[type[ChatError]]:
    for one in kind.__subclasses__():
        yield from _subclasses(one)
        if "code" in vars(one):
            yield one


def test_the_table_of_close_codes_has_each_code() -> None:
    text = (DOCS / "errors.md").read_text()
    table = text[text.index("## Close codes") : text.index("## Final")]
    found = {int(code) for row in re.findall(r"^\| ([\d, ]+) \|", table, re.M) for code in row.split(", ")}
    assert {int(code) for code in Close} <= found
    assert found & {way.code for way in Final} == set()
