"""The demo page and chatd.js in a real Chromium against a real daemon.

Playwright's sync API wants plain functions; nothing here runs under trio. All waiting is Playwright's.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytest.importorskip("playwright.sync_api")
from playwright.sync_api import Browser, Page, WebSocketRoute, expect, sync_playwright

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE = 60_000  # ms: a client may wait 20 s between two tries
ROOM = 1
ADA, GRACE, ALAN = 1, 2, 3

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")

Open = Callable[..., Page]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(demo: Any, browser: Browser) -> Iterator[Open]:
    """Opens the page as somebody, each in a profile of its own. No page may throw or offend against the CSP."""
    offences: list[str] = []
    contexts = []

    def note(text: str) -> None:
        if "Content Security Policy" in text or "Trusted" in text:
            offences.append(text)

    def open_as(user: int, room: int = ROOM, *, socket: Callable[[WebSocketRoute], None] | None = None) -> Page:
        context = browser.new_context(viewport={"width": 1280, "height": 800})
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: note(message.text))
        page.on("pageerror", lambda error: offences.append(str(error)))
        if socket:
            page.route_web_socket(re.compile("/ws$"), socket)
        page.goto(f"{demo.url}/?user={user}&room={room}")
        expect(status(page)).to_have_attribute("data-state", "online")
        return page

    yield open_as
    for context in contexts:
        context.close()
    assert offences == []


def status(page: Page) -> Any:
    return page.locator("#status")


def write(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def expect_messages(page: Page, *texts: str) -> None:
    """Exactly these, in this order, all of them sent."""
    expect(page.locator(".message .text")).to_have_text(list(texts), timeout=PATIENCE)
    expect(page.locator('.message:not([data-state="sent"])')).to_have_count(0, timeout=PATIENCE)


def test_two_people_talk(demo: Any, open_page: Open) -> None:
    ada, grace = open_page(ADA), open_page(GRACE)
    write(ada, "Hello Grace")
    expect(grace.get_by_text("Hello Grace")).to_be_visible()
    write(grace, "Hello Ada")
    for page in (ada, grace):
        expect_messages(page, "Hello Grace", "Hello Ada")
    expect(ada.locator(".mine")).to_have_text(re.compile("Hello Grace"))
    expect(grace.locator(".mine")).to_have_text(re.compile("Hello Ada"))
    expect(ada.locator(".message:not(.mine) .name")).to_have_text("Grace")


def test_a_backend_posts_into_an_empty_room(demo: Any, open_page: Open) -> None:
    page = open_page(ADA)
    expect(page.locator("#curl")).to_contain_text(f"curl -X POST {demo.url}/api/ws/messages")
    expect(page.locator("#curl")).to_contain_text(f'"conversation_id":{ROOM}')
    demo.post(ROOM, 17, "Hello from the backend")
    expect_messages(page, "Hello from the backend")
    expect(page.locator(".name")).to_have_text("User 17")
    expect(page.locator("#empty")).to_be_hidden()


def test_scrolling_up_loads_what_came_before(demo: Any, open_page: Open) -> None:
    texts = [f"message {number}" for number in range(130)]
    for text in texts:
        demo.post(ROOM, GRACE, text)
    page = open_page(ADA)
    expect_messages(page, *texts[-50:])
    expect(page.get_by_text(texts[-1], exact=True)).to_be_in_viewport()
    for _ in range(2):
        shown = page.locator(".message").count()
        page.locator("#scroller").evaluate("element => (element.scrollTop = 0)")
        expect(page.locator(".message").nth(shown)).to_be_attached()
    expect_messages(page, *texts)


def test_new_messages_do_not_tear_the_reader_away(demo: Any, open_page: Open) -> None:
    for number in range(50):
        demo.post(ROOM, GRACE, f"message {number}")
    page = open_page(ADA)
    expect(page.get_by_text("message 49", exact=True)).to_be_in_viewport()
    page.locator("#scroller").evaluate("element => (element.scrollTop = element.scrollHeight / 2)")
    expect(page.get_by_text("message 49", exact=True)).not_to_be_in_viewport()
    demo.post(ROOM, GRACE, "news")
    page.get_by_role("button", name="1 new message").click()
    expect(page.get_by_text("news", exact=True)).to_be_in_viewport()
    expect(page.locator("#newer")).to_be_hidden()


def test_text_is_never_markup(demo: Any, open_page: Open) -> None:
    ada, grace = open_page(ADA), open_page(GRACE)
    hostile = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
    write(ada, hostile)
    demo.post(ROOM, ALAN, hostile)
    for page in (ada, grace):
        expect_messages(page, hostile, hostile)
        expect(page.locator("#messages img, #messages script")).to_have_count(0)
        assert "pwned" not in page.title()


def test_editing_and_deleting(demo: Any, open_page: Open) -> None:
    ada, grace = open_page(ADA), open_page(GRACE)
    write(ada, "frist")
    write(ada, "second")
    expect_messages(ada, "frist", "second")
    first, second = ada.locator(".message").nth(0), ada.locator(".message").nth(1)
    first.hover()
    first.get_by_role("button", name="Edit").click()
    write(ada, "first")
    second.hover()
    second.get_by_role("button", name="Delete").click()
    second.get_by_role("button", name="Delete").click()
    for page in (ada, grace):
        expect_messages(page, "first", "Message deleted")
        expect(page.locator(".edited:visible")).to_have_count(1)
    ada.reload()
    expect_messages(ada, "first", "Message deleted")


def test_the_state_of_the_connection_is_shown(demo: Any, open_page: Open) -> None:
    page = open_page(ADA)
    expect(page.locator("#banner")).to_be_hidden()
    demo.kill()
    expect(status(page)).to_have_attribute("data-state", "offline")
    expect(page.locator("#banner")).to_contain_text("Connection lost.")
    expect(page.locator("#banner")).to_contain_text(re.compile(r"Reconnecting in \d+ s…"))
    expect(page.get_by_role("button", name="Try now")).to_be_visible()
    demo.start()
    expect(status(page)).to_have_attribute("data-state", "online", timeout=PATIENCE)
    expect(page.locator("#banner")).to_contain_text("Connected again.")
    expect(page.locator("#banner")).to_be_hidden()


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_restart_loses_and_doubles_nothing(demo: Any, open_page: Open, end: str) -> None:
    ada, grace = open_page(ADA), open_page(GRACE)
    write(ada, "one")
    demo.post(ROOM, ALAN, "two")
    for page in (ada, grace):
        expect_messages(page, "one", "two")
    getattr(demo, end)()
    for page in (ada, grace):
        expect(status(page)).not_to_have_attribute("data-state", "online")
    write(ada, "three, typed while the server was down")
    write(ada, "four, too")
    expect(ada.locator('.message[data-state="pending"]')).to_have_count(2)
    demo.start()
    for page in (ada, grace):
        expect(status(page)).to_have_attribute("data-state", "online", timeout=PATIENCE)
        expect_messages(page, "one", "two", "three, typed while the server was down", "four, too")
    write(grace, "five")
    for page in (ada, grace):
        expect_messages(page, "one", "two", "three, typed while the server was down", "four, too", "five")
    ada.reload()
    expect_messages(ada, "one", "two", "three, typed while the server was down", "four, too", "five")


class Network:
    """Stands between a page and the daemon: can be cut, and can lose the next reply to a `send`."""

    def __init__(self) -> None:
        self.up = True
        self.lose_next_ok = False
        self.sent: list[dict[str, Any]] = []
        self._sockets: list[WebSocketRoute] = []

    def __call__(self, socket: WebSocketRoute) -> None:
        if not self.up:
            socket.close(code=4000, reason="cut")
            return
        self._sockets.append(socket)
        server = socket.connect_to_server()
        socket.on_message(lambda text: self._upward(server, text))
        server.on_message(lambda text: self._downward(socket, text))

    def cut(self) -> None:
        self.up = False
        for socket in self._sockets:
            socket.close(code=4000, reason="cut")
        self._sockets.clear()

    def _upward(self, server: WebSocketRoute, text: str | bytes) -> None:
        frame = json.loads(text)
        if frame["event"] == "send":
            self.sent.append(frame)
        server.send(text)

    def _downward(self, socket: WebSocketRoute, text: str | bytes) -> None:
        if self.lose_next_ok and json.loads(text)["event"] in ("ok", "message"):
            if json.loads(text)["event"] == "ok":
                self.lose_next_ok = False
                socket.close(code=4000, reason="lost")
            return
        socket.send(text)


def test_what_was_posted_while_a_page_was_away_is_made_up_for(demo: Any, open_page: Open) -> None:
    network = Network()
    ada, grace = open_page(ADA, socket=network), open_page(GRACE)
    write(ada, "before")
    expect_messages(grace, "before")
    network.cut()
    expect(status(ada)).to_have_attribute("data-state", "offline")
    missed = [f"missed {number}" for number in range(20)]
    for text in missed:
        demo.post(ROOM, ALAN, text)
    write(ada, "written while away")
    expect_messages(grace, "before", *missed)
    network.up = True
    for page in (ada, grace):
        expect_messages(page, "before", *missed, "written while away")


def test_an_absence_too_long_to_replay_starts_afresh(demo: Any, open_page: Open) -> None:
    network = Network()
    ada = open_page(ADA, socket=network)
    demo.post(ROOM, ALAN, "before")
    expect_messages(ada, "before")
    network.cut()
    missed = [f"missed {number}" for number in range(320)]
    for text in missed:
        demo.post(ROOM, ALAN, text)
    network.up = True
    expect_messages(ada, *missed[-50:])
    ada.locator("#scroller").evaluate("element => (element.scrollTop = 0)")
    expect(ada.get_by_text(missed[-51], exact=True)).to_be_attached()
    expect_messages(ada, *missed[-100:])


def test_a_lost_reply_makes_no_second_message(demo: Any, open_page: Open) -> None:
    network = Network()
    ada, grace = open_page(ADA, socket=network), open_page(GRACE)
    network.lose_next_ok = True
    write(ada, "once")
    write(ada, "after it")
    for page in (ada, grace):
        expect_messages(page, "once", "after it")
    once = [frame["client_id"] for frame in network.sent if frame["content"] == "once"]
    assert len(once) == 2
    assert len(set(once)) == 1


# chatd.js by itself, in a page that is somebody else's


CLIENT = """async (options) => {
  const { Chat } = await import("/chatd.js");
  const demo = await (await fetch("/demo/token?user=3")).json();
  const chat = new Chat({
    url: `ws://${location.hostname}:${demo.websocket_port}/ws`,
    token: async () => options.token ?? demo.token,
  });
  const got = window.got = { messages: [], states: [], errors: [] };
  window.chat = chat;
  addEventListener("error", (event) => { got.errors.push(event.message); event.preventDefault(); });
  chat.addEventListener("state", ({ detail }) => got.states.push(detail));
  const room = window.room = chat.join(options.room);
  room.addEventListener("unsubscribed", ({ detail }) => (got.unsubscribed = detail));
  room.addEventListener("message", ({ detail: { seq, content } }) => {
    got.messages.push([seq, room.cursor, content]);
  });
  if (options.hostile) {
    const fail = () => { throw new Error("a bug in the application"); };
    chat.addEventListener("state", fail);
    for (const event of ["message", "reset", "subscribed"]) room.addEventListener(event, fail);
  }
  const synced = new Promise((resolve) => room.addEventListener("subscribed", resolve));
  const stopped = new Promise((resolve) => {
    chat.addEventListener("state", ({ detail: { state } }) => state === "stopped" && resolve());
  });
  chat.connect();
  await Promise.race([synced, stopped]);
}"""


def wait_until(page: Page, condition: str) -> None:
    """Like page.wait_for_function, which the page's CSP forbids: it evaluates strings."""
    page.evaluate(
        f"""async (patience) => {{
          for (const end = Date.now() + patience; !({condition});) {{
            if (Date.now() > end) throw new Error("waited in vain");
            await new Promise((wake) => setTimeout(wake, 20));
          }}
        }}""",
        PATIENCE,
    )


def test_a_throwing_listener_harms_nothing(demo: Any, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(demo.url)
    page.evaluate(CLIENT, {"room": 2, "hostile": True})
    for text in ("one", "two"):
        demo.post(2, ADA, text)
    wait_until(page, "got.messages.length === 2")
    reply = page.evaluate("chat.send(2, 'three')")
    assert reply["seq"] == 3
    demo.kill()
    wait_until(page, "chat.state !== 'online'")
    demo.start()
    wait_until(page, "chat.state === 'online'")
    page.evaluate("chat.send(2, 'four')")
    wait_until(page, "got.messages.length === 4")
    got = page.evaluate("got")
    # The cursor was moved before the listeners were called.
    assert got["messages"] == [[1, 1, "one"], [2, 2, "two"], [3, 3, "three"], [4, 4, "four"]]
    assert any("a bug in the application" in error for error in got["errors"])
    page.close()


def test_an_invalid_token_stops_for_good(demo: Any, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(demo.url)
    page.evaluate(CLIENT, {"room": 2, "token": "nonsense"})
    states = page.evaluate("got.states")
    assert [state["state"] for state in states] == ["connecting", "stopped"]
    assert states[-1]["code"] == 4500
    page.close()


def test_refusals_reject_and_do_not_block_what_follows(demo: Any, browser: Browser) -> None:
    page = browser.new_page()
    page.goto(demo.url)
    page.evaluate(CLIENT, {"room": 2})
    refused = page.evaluate("""async () => {
      const first = chat.send(2, "", {});
      const second = chat.send(2, "fine");
      const code = await first.then(() => "accepted", (error) => error.code);
      return [code, (await second).seq];
    }""")
    assert refused == ["bad_request", 1]
    page.close()


def test_messages_sent_in_a_burst_keep_their_order(demo: Any, browser: Browser) -> None:
    """More than the rate limit allows at once: what is refused for the moment is not overtaken."""
    page = browser.new_page()
    page.goto(demo.url)
    page.evaluate(CLIENT, {"room": 2})
    page.evaluate("Promise.all(Array.from({ length: 40 }, (_, number) => chat.send(2, `${number}`)))")
    wait_until(page, "got.messages.length === 40")
    assert [text for _, _, text in page.evaluate("got.messages")] == [str(number) for number in range(40)]
    page.close()
