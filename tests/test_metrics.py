"""What an operator sees: /metrics as a Prometheus reads it, /status as a person does, what is built on them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from chatd.observe import metrics
from chatd.observe.sampler import percentile
from tests.client import login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.test_page import BrowserContext, Page, browser, expect  # noqa: F401  # a fixture

DOCS = Path(__file__).parents[1] / "docs"
OPERATING = (DOCS / "operating.md").read_text()
PART = re.compile(r"_(bucket|sum|count)$")
OF_THE_PROCESS = ("process_", "python_")


def families(daemon: Daemon) -> dict[str, Any]:
    """By the name that is documented: the one of a counter ends in `_total`."""
    text = daemon.get("/metrics").body.decode()
    found = text_string_to_metric_families(text)
    return {one.name + "_total" * (one.type == "counter"): one for one in found}


def value(daemon: Daemon, name: str, **labels: str) -> float:
    samples: Iterator[Sample] = (sample for one in families(daemon).values() for sample in one.samples)
    return sum(s.value for s in samples if s.name == name and labels.items() <= s.labels.items())


async def test_a_prometheus_reads_exactly_what_is_documented(daemons: Daemons) -> None:
    daemon = await trio.to_thread.run_sync(partial(daemons, api__previous_internal_token="old"))
    async with login(daemon, 1, {"1": None}):
        found = await trio.to_thread.run_sync(families, daemon)
    rows = re.findall(r"^\| `(chatd_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", OPERATING, re.MULTILINE)
    documented = {name: (kind, text) for name, kind, _, text in rows}
    ours = {name: (one.type, one.documentation) for name, one in found.items() if name.startswith("chatd")}
    assert ours == documented
    others = [name for name in found if not name.startswith(("chatd_", *OF_THE_PROCESS))]
    assert not others
    labels = {name: set(re.findall(r"`(\w+)`", text)) for name, _, text, _ in rows}
    for name, one in found.items():
        for sample in one.samples:
            assert set(sample.labels) - {"le"} <= labels.get(name, set(sample.labels)), sample


PROMETHEUS = (  # as version 3 asks
    "application/openmetrics-text;version=1.0.0;escaping=allow-utf-8;q=0.6,text/plain;version=0.0.4;q=0.3,*/*;q=0.2"
)


@pytest.mark.parametrize(
    ("accept", "kind", "version"),
    [
        (None, "text/plain", "0.0.4"),
        ("*/*", "text/plain", "0.0.4"),
        ("text/plain;version=0.0.4", "text/plain", "0.0.4"),
        ("text/plain;version=1.0.0", "text/plain", "1.0.0"),
        (PROMETHEUS, "application/openmetrics-text", "1.0.0"),
        ("\xff", "text/plain", "0.0.4"),
    ],
)
def test_the_format_is_the_one_that_is_asked_for(
    daemon: Daemon, accept: str | None, kind: str, version: str
) -> None:
    answer = daemon.request("GET", "/metrics", headers={"Accept": accept} if accept else {})
    assert answer.status == 200
    told, *parameters = answer.headers["Content-Type"].split("; ")
    assert (told, f"version={version}" in parameters) == (kind, True), parameters
    parse = openmetrics if kind != "text/plain" else text_string_to_metric_families
    assert {"chatd_users", "chatd_rooms"} <= {one.name for one in parse(answer.body.decode())}


def test_a_header_that_cannot_be_read_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = metrics.choose_encoder

    def fail(accept: str) -> Any:
        if accept:
            raise TypeError
        return choose(accept)

    monkeypatch.setattr(metrics, "choose_encoder", fail)
    assert metrics.exposition("text/plain")[1] == choose("")[1]


def test_dashboard_and_alerts_use_what_there_is() -> None:
    documented = set(re.findall(r"^\| `(chatd_\w+)` ", OPERATING, re.MULTILINE))
    dashboard, alerts = (DOCS / "grafana.json").read_text(), (DOCS / "alerts.yml").read_text()
    assert len(json.loads(dashboard)["panels"]) > 15
    for text in (dashboard, alerts):
        used = {PART.sub("", name) for name in re.findall(r"\bchatd_[a-z_]+", text)}
        assert used
        assert used <= documented, used - documented
    for alert in re.findall(r"alert: (\w+)", alerts):
        assert f"**{alert}.**" in OPERATING, "the runbook has a paragraph for each"


async def test_what_happens_is_counted(daemons: Daemons) -> None:
    daemon = await trio.to_thread.run_sync(daemons)

    async def count(name: str, **labels: str) -> float:
        return await trio.to_thread.run_sync(partial(value, daemon, name, **labels))

    async with login(daemon, 1, {"1": None}) as here:
        for _ in range(2):
            daemon.post(1, 2, "hello", client_id="one")
        await here.expect("message")
        assert daemon.request("POST", "/api/ws/messages", {"conversation_id": 1}).status == 422
    assert await count("chatd_connections", state="ready") == 0
    async with login(daemon, 1, {"1": 0}), login(daemon, 3, {"1": 7}):
        assert await count("chatd_connections", state="ready") == 2
        assert await count("chatd_connections", state="connecting") == 0
        while await count("chatd_subscriptions") != 2:
            await trio.sleep(0.05)
        assert (await count("chatd_users"), await count("chatd_rooms")) == (2, 1)
    posted = {name: await count("chatd_messages_posted_total", outcome=name) for name in ("ok", "duplicate")}
    assert posted == {"ok": 1, "duplicate": 1}
    assert await count("chatd_post_duration_seconds_count", outcome="bad_request") == 1
    assert await count("chatd_messages_delivered_total", source="live") == 1
    # One came back and missed it, one has a cursor beyond the head and gets the newest instead.
    assert await count("chatd_messages_delivered_total", source="replay") == 2
    assert await count("chatd_recoveries_total", recovered="true") == 1
    assert await count("chatd_recoveries_total", recovered="false") == 1
    assert await count("chatd_resets_total", reason="other_history") == 1
    assert await count("chatd_connections_opened_total") == 3
    assert await count("chatd_delivery_lag_seconds_count") == 1
    assert await count("chatd_db_duration_seconds_count", op="commit") >= 2
    assert await count("chatd_eventloop_lag_seconds_count") > 1


def test_a_percentile_is_the_bound_of_its_bucket() -> None:
    def buckets(*counts: int) -> dict[str, float]:
        return dict(zip(["x_bucket{0.1}", "x_bucket{1.0}", "x_bucket{+Inf}"], map(float, counts), strict=True))

    assert percentile("x", buckets(100, 100, 100), {}) == 0.1
    assert percentile("x", buckets(100, 102, 102), {}) == 1.0
    assert percentile("x", buckets(100, 100, 102), {}) == 1.0, "beyond the last bound it is not known"
    assert percentile("x", buckets(100, 110, 110), buckets(100, 100, 100)) == 1.0, "since the last look"
    assert percentile("x", buckets(5, 5, 5), buckets(5, 5, 5)) == 0.0
    assert percentile("y", buckets(5, 5, 5), {}) == 0.0


@pytest.fixture
def page(browser: BrowserContext, daemon: Daemon) -> Iterator[Page]:  # noqa: F811
    page = browser.new_page()
    problems: list[str] = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(f"{daemon.url}/status")
    yield page
    page.close()
    assert not problems


def test_the_status_page_shows_how_it_is(page: Page, daemon: Daemon, conversation: int) -> None:
    expect(page.locator("#health")).to_have_text("All is well")
    expect(page.locator("#checks li")).to_have_text(["Database ok", "Migrations ok"])
    expect(page.locator(".tile h2")).to_contain_text(["Connections", "Users online", "Rooms in use"])
    daemon.post(conversation, 1, "hello")
    messages = page.locator(".tile", has_text="Messages in")
    expect(messages.locator(".range")).to_contain_text("most: ", timeout=15_000)
    expect(messages.locator(".line")).to_have_attribute("d", re.compile(r"^M[\d. L]+$"), timeout=15_000)
    memory = page.locator(".tile", has_text="Memory").locator(".number")
    expect(memory).to_have_text(re.compile(r"^\d{2,3}$"))


def test_the_status_page_says_when_nobody_answers(browser: BrowserContext, daemons: Daemons) -> None:  # noqa: F811
    daemon = daemons()
    page = browser.new_page()
    page.goto(f"{daemon.url}/status")
    expect(page.locator("#health")).to_have_text("All is well")
    daemon.kill()
    expect(page.locator("#health")).to_contain_text("No answer", timeout=15_000)
    page.close()
