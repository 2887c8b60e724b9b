"""The demo page and chatd.js in a real Chromium against a real daemon.

Playwright's sync API wants plain functions; nothing here runs under trio. One daemon serves all tests, each in
a room of its own; those that end it start it again.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest

from tests.bad_network import SETTINGS, BadNetwork, faults_of, in_page, options
from tests.conftest import Daemons
from tests.daemon import Daemon

pytestmark = pytest.mark.service

try:
    from playwright.sync_api import BrowserContext, Error, Page, WebSocketRoute, expect, sync_playwright
except ImportError:
    sync_playwright = None

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]
PATIENCE = 30_000  # ms
LONGEST_WAIT = 300  # ms between two tries to connect, instead of 20 s
SENDS_PER_SECOND = 20
ADA, GRACE, ALAN = 1, 2, 3
COFFEE = 3  # a room that every page follows

Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def browser() -> Iterator[BrowserContext]:
    if sync_playwright is None:
        pytest.fail("These tests need Playwright: pip install -e '.[dev]'", pytrace=False)
    if CHROMIUM is None:
        pytest.fail("These tests need Chromium: apt-get install chromium, or set CHROMIUM.", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser.new_context(viewport={"width": 1280, "height": 800})
        browser.close()


@pytest.fixture(scope="module")
def only_daemon(browser: BrowserContext, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    directory = tmp_path_factory.mktemp("demo")
    daemon = Daemon(directory, demo=True, limits__sends_per_second=SENDS_PER_SECOND)
    yield daemon.start()
    daemon.close()


@pytest.fixture
def demo(only_daemon: Daemon) -> Iterator[Daemon]:
    """`chatd serve --demo`."""
    yield only_daemon
    try:
        only_daemon.get("/healthz")
    except OSError:  # the test failed while it was down
        only_daemon.start()


@pytest.fixture
def room(conversation: int) -> int:
    return conversation


@pytest.fixture
def open_page(demo: Daemon, browser: BrowserContext, room: int) -> Iterator[Open]:
    """Opens the page as somebody. It may not throw, offend against the CSP, or send unknown events."""
    offences: list[str] = []
    pages: list[Page] = []

    def note(text: str | bytes) -> None:
        if any(word in str(text) for word in ("Content Security Policy", "Trusted", "unknown_event")):
            offences.append(str(text))

    def open_as(
        user: int, *, socket: Callable[[WebSocketRoute], None] | None = None, clock: bool = False
    ) -> Page:
        page = browser.new_page()
        pages.append(page)
        page.on("console", lambda message: note(message.text))
        page.on("pageerror", lambda error: offences.append(str(error)))
        page.on("websocket", lambda socket: socket.on("framereceived", note))
        if socket:
            page.route_web_socket(re.compile("/ws$"), socket)
        if clock:
            page.clock.install()
        page.goto(f"{demo.url}/?user={user}&room={room}&longest_wait={LONGEST_WAIT}")
        wait_for_state(page, "online")
        return page

    yield open_as
    for page in pages:
        page.close()
    assert offences == []


def wait_until(page: Page, condition: str, wanted: Any = None) -> None:
    """Like page.wait_for_function, which the page's CSP forbids: it evaluates strings."""
    page.evaluate(
        f"""async ([patience, wanted]) => {{
          for (const end = Date.now() + patience; !({condition});) {{
            if (Date.now() > end) throw new Error("waited in vain");
            await new Promise((wake) => setTimeout(wake, 20));
          }}
        }}""",
        [PATIENCE, wanted],
    )


def wait_for_state(page: Page, *states: str) -> None:
    wait_until(page, "wanted.includes(document.getElementById('status').dataset.state)", states)


def write(page: Page, text: str) -> None:
    page.get_by_label("Message", exact=True).fill(text)
    page.keyboard.press("Enter")


def expect_messages(page: Page, *texts: str) -> None:
    """Exactly these, in this order, all of them sent."""
    shown = "[...document.querySelectorAll('.message .text')].map((text) => text.textContent)"
    unsent = "document.querySelector('.message:not([data-state=sent])')"
    with suppress(Error):  # expect() below says what is wrong; it looks less often
        wait_until(page, f"JSON.stringify({shown}) === JSON.stringify(wanted) && !{unsent}", texts)
    expect(page.locator(".message .text")).to_have_text(list(texts))
    expect(page.locator('.message:not([data-state="sent"])')).to_have_count(0)


def post_all(demo: Daemon, room: int, sender: int, texts: list[str]) -> None:
    messages = [{"conversation_id": room, "sender_id": sender, "content": text} for text in texts]
    answer = demo.request("POST", "/api/ws/messages/batch", {"messages": messages})
    assert all("id" in result for result in answer.json["results"])


def test_two_people_talk(open_page: Open) -> None:
    ada, grace = open_page(ADA), open_page(GRACE)
    write(ada, "Hello Grace")
    expect_messages(grace, "Hello Grace")
    write(grace, "Hello Ada")
    for page in (ada, grace):
        expect_messages(page, "Hello Grace", "Hello Ada")
    expect(ada.locator(".mine")).to_have_text(re.compile("Hello Grace"))
    expect(grace.locator(".mine")).to_have_text(re.compile("Hello Ada"))
    expect(ada.locator(".message:not(.mine) .name")).to_have_text("Grace")


def test_a_backend_posts_into_an_empty_room(demo: Daemon, open_page: Open, room: int) -> None:
    page = open_page(ADA)
    expect(page.locator("#curl")).to_contain_text(f"curl -X POST {demo.url}/api/ws/messages")
    expect(page.locator("#curl")).to_contain_text(f'"conversation_id":{room}')
    demo.post(room, 17, "Hello from the backend")
    expect_messages(page, "Hello from the backend")
    expect(page.locator(".name")).to_have_text("User 17")
    expect(page.locator("#empty")).to_be_hidden()


def test_scrolling_up_loads_what_came_before(demo: Daemon, open_page: Open, room: int) -> None:
    texts = [f"message {number}" for number in range(130)]
    post_all(demo, room, GRACE, texts)
    page = open_page(ADA)
    expect_messages(page, *texts[-50:])
    expect(page.get_by_text(texts[-1], exact=True)).to_be_in_viewport()
    for loaded in (texts[-100:], texts):
        page.locator("#scroller").evaluate("element => (element.scrollTop = 0)")
        expect_messages(page, *loaded)


def test_new_messages_do_not_tear_the_reader_away(demo: Daemon, open_page: Open, room: int) -> None:
    texts = [f"message {number}" for number in range(50)]
    post_all(demo, room, GRACE, texts)
    page = open_page(ADA)
    expect_messages(page, *texts)
    expect(page.get_by_text("message 49", exact=True)).to_be_in_viewport()
    page.locator("#scroller").evaluate("element => (element.scrollTop = element.scrollHeight / 2)")
    expect(page.get_by_text("message 49", exact=True)).not_to_be_in_viewport()
    demo.post(room, GRACE, "news")
    page.get_by_role("button", name="1 new message").click()
    expect(page.get_by_text("news", exact=True)).to_be_in_viewport()
    expect(page.locator("#newer")).to_be_hidden()


def test_other_rooms_count_what_comes_while_they_are_not_open(demo: Daemon, open_page: Open) -> None:
    page = open_page(ADA)
    coffee = page.locator(f'#rooms [data-room="{COFFEE}"]')
    demo.post(COFFEE, GRACE, "There is cake")
    demo.post(COFFEE, ALAN, "Was")
    demo.post(COFFEE, ADA, "Sent from another window")
    expect(coffee.locator(".count")).to_have_text("2")
    expect(page).to_have_title(re.compile(r"^\(2\) "))
    coffee.click()
    expect_messages(page, "There is cake", "Was", "Sent from another window")
    expect(coffee.locator(".count")).to_be_hidden()
    expect(page).to_have_title("#coffee · chatd")


@pytest.mark.parametrize("before", [0, 120])
def test_a_busy_room_that_is_opened_has_no_gap(demo: Daemon, open_page: Open, room: int, before: int) -> None:
    """A page of history arrives late, while so much is posted that what is old is forgotten."""
    network = Network()
    texts = [f"message {number}" for number in range(1000)]
    if before:
        post_all(demo, room, GRACE, texts[:before])
    network.hold_history = True
    page = open_page(ADA, socket=network)
    for first in range(before, 1000, 110):
        post_all(demo, room, GRACE, texts[first : first + 110])
        newest = texts[: first + 110][-1]
        wait_until(page, "document.querySelector('.message:last-child .text')?.textContent === wanted", newest)
    network.hold_history = False
    assert network.let_history_pass()
    wait_until(page, "!document.getElementById('earlier').hidden")
    shown: list[str] = []
    for _ in range(25):
        shown = page.locator(".message .text").all_text_contents()
        assert shown == texts[-len(shown) :]
        if shown == texts:
            break
        page.locator("#scroller").evaluate("element => (element.scrollTop = element.scrollHeight / 2)")
        page.locator("#earlier").click()
        wait_until(page, "document.querySelectorAll('.message').length !== wanted", len(shown))
    assert shown == texts
    expect(page.locator("#earlier")).to_be_hidden()


def test_what_was_begun_in_a_room_stays_there(demo: Daemon, open_page: Open, room: int) -> None:
    page = open_page(ADA)
    box = page.get_by_label("Message", exact=True)
    here, coffee = (page.locator(f'#rooms [data-room="{id}"]') for id in (room, COFFEE))
    write(page, "sent")
    expect_messages(page, "sent")
    box.fill("a draft")
    coffee.click()
    expect(box).to_have_value("")
    box.fill("another draft")
    here.click()
    expect(box).to_have_value("a draft")
    page.locator(".message").hover()
    page.get_by_role("button", name="Edit").click()
    box.fill("an edit")
    coffee.click()
    expect(box).to_have_value("another draft")
    expect(page.locator("#editing")).to_be_hidden()
    here.click()
    expect(box).to_have_value("an edit")
    box.press("Enter")
    expect_messages(page, "an edit")
    expect(box).to_have_value("a draft")


def test_the_note_of_a_refusal_stays_in_its_room(demo: Daemon, open_page: Open, room: int) -> None:
    network = Network()
    page = open_page(ADA, socket=network)
    write(page, "one")
    expect_messages(page, "one")
    demo.post(COFFEE, ADA, "in the other room")
    network.refuse_next = "react"
    page.locator(".message").hover()
    page.get_by_role("button", name="React with 🎉").click()
    page.locator(f'#rooms [data-room="{COFFEE}"]').click()
    wait_until(page, "document.querySelectorAll('.message').length > 0")
    network.refuse()
    page.locator(f'#rooms [data-room="{room}"]').click()
    expect(page.locator(".note-text")).to_have_text("Not changed: refused by the test")


def test_what_is_read_elsewhere_is_not_unread(demo: Daemon, open_page: Open, room: int) -> None:
    desk, phone = open_page(ADA), open_page(ADA)
    desk.locator(f'#rooms [data-room="{COFFEE}"]').click()
    phone.locator(f'#rooms [data-room="{COFFEE}"]').click()
    demo.post(room, GRACE, "Have you read this?")
    badge = desk.locator(f'#rooms [data-room="{room}"] .count')
    expect(badge).to_have_text("1")
    phone.bring_to_front()
    phone.locator(f'#rooms [data-room="{room}"]').click()
    expect(badge).to_be_hidden()


def test_text_is_never_markup(demo: Daemon, open_page: Open, room: int) -> None:
    ada, grace = open_page(ADA), open_page(GRACE)
    hostile = "<img src=x onerror=\"document.title='pwned'\"><script>document.title='pwned'</script>"
    write(ada, hostile)
    expect_messages(grace, hostile)
    demo.post(room, ALAN, hostile)
    for page in (ada, grace):
        expect_messages(page, hostile, hostile)
        expect(page.locator("#messages img, #messages script")).to_have_count(0)
        assert "pwned" not in page.title()


def test_editing_and_deleting(open_page: Open) -> None:
    grace, ada = open_page(GRACE), open_page(ADA)  # the mouse wants hers in front
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


def test_the_state_of_the_connection_is_shown(demo: Daemon, open_page: Open) -> None:
    page = open_page(ADA, clock=True)
    expect(page.locator("#banner")).to_be_hidden()
    demo.kill()
    wait_for_state(page, "offline")
    expect(page.locator("#banner")).to_contain_text("Connection lost.")
    expect(page.locator("#banner")).to_contain_text(re.compile(r"Reconnecting in \d+ s…"))
    expect(page.get_by_role("button", name="Try now")).to_be_visible()
    demo.start()
    wait_for_state(page, "online")
    expect(page.locator("#banner")).to_contain_text("Connected again.")
    page.clock.fast_forward(3_000)
    expect(page.locator("#banner")).to_be_hidden()


@pytest.mark.parametrize("end", ["kill", "stop"])
def test_a_restart_loses_and_doubles_nothing(demo: Daemon, open_page: Open, room: int, end: str) -> None:
    ada, grace = open_page(ADA), open_page(GRACE)
    write(ada, "one")
    expect_messages(grace, "one")
    demo.post(room, ALAN, "two")
    for page in (ada, grace):
        expect_messages(page, "one", "two")
    getattr(demo, end)()
    for page in (ada, grace):
        wait_for_state(page, "offline", "connecting")
    write(ada, "three, typed while the server was down")
    write(ada, "four, too")
    expect(ada.locator('.message[data-state="pending"]')).to_have_count(2)
    demo.start()
    for page in (ada, grace):
        wait_for_state(page, "online")
        expect_messages(page, "one", "two", "three, typed while the server was down", "four, too")
    write(grace, "five")
    for page in (ada, grace):
        expect_messages(page, "one", "two", "three, typed while the server was down", "four, too", "five")
    ada.reload()
    expect_messages(ada, "one", "two", "three, typed while the server was down", "four, too", "five")


class Network:
    """Stands between a page and the daemon: can be cut, lose the next reply to a `send`, hold replies back."""

    def __init__(self) -> None:
        self.up = True
        self.lose_next_ok = False
        self.hold_history = False
        self.refuse_next = ""  # an event that is not passed on, and answered only by `refuse`
        self._held: list[str | bytes] = []
        self._refused: dict[str, Any] = {}
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

    def ask_to_move(self) -> None:
        """As a node does that is about to stop, and has another beside it."""
        self._sockets[-1].send('{"event":"reconnect","reason":"restart","delay":[50,300],"deadline_ms":5000}')

    def let_history_pass(self) -> bool:
        """Whether there was any."""
        held, self._held = self._held, []
        for text in held:
            self._sockets[-1].send(text)
        return bool(held)

    def refuse(self) -> None:
        error = {"event": "error", "ref": self._refused["ref"], "code": "forbidden", "retryable": False}
        self._sockets[-1].send(json.dumps(error | {"message": "refused by the test"}))

    @property
    def connections(self) -> int:
        """How many there have been."""
        return len(self._sockets)

    def _upward(self, server: WebSocketRoute, text: str | bytes) -> None:
        frame = json.loads(text)
        if frame["event"] == "send":
            self.sent.append(frame)
        if frame["event"] == self.refuse_next:
            self.refuse_next, self._refused = "", frame
            return
        server.send(text)

    def _downward(self, socket: WebSocketRoute, text: str | bytes) -> None:
        if self.lose_next_ok and json.loads(text)["event"] in ("ok", "message"):
            if json.loads(text)["event"] == "ok":
                self.lose_next_ok = False
                socket.close(code=4000, reason="lost")
            return
        if self.hold_history and json.loads(text)["event"] == "history":
            self._held.append(text)
            return
        socket.send(text)


def test_what_was_posted_while_a_page_was_away_is_made_up_for(demo: Daemon, open_page: Open, room: int) -> None:
    network = Network()
    ada, grace = open_page(ADA, socket=network), open_page(GRACE)
    write(ada, "before")
    expect_messages(grace, "before")
    network.cut()
    wait_for_state(ada, "offline")
    missed = [f"missed {number}" for number in range(20)]
    post_all(demo, room, ALAN, missed)
    write(ada, "written while away")
    expect_messages(grace, "before", *missed)
    network.up = True
    for page in (ada, grace):
        expect_messages(page, "before", *missed, "written while away")


def test_an_absence_too_long_to_replay_starts_afresh(demo: Daemon, open_page: Open, room: int) -> None:
    network = Network()
    ada = open_page(ADA, socket=network)
    demo.post(room, ALAN, "before")
    expect_messages(ada, "before")
    network.cut()
    missed = [f"missed {number}" for number in range(320)]
    post_all(demo, room, ALAN, missed)
    network.up = True
    expect_messages(ada, *missed[-50:])
    ada.locator("#scroller").evaluate("element => (element.scrollTop = 0)")
    expect_messages(ada, *missed[-100:])


def test_a_page_that_is_asked_to_move_is_never_offline(demo: Daemon, open_page: Open, room: int) -> None:
    """The new connection is there before the old one ends, and nothing comes by both."""
    network = Network()
    ada = open_page(ADA, socket=network)
    ada.evaluate(
        """() => {
          const status = document.getElementById("status");
          window.states = [];
          const note = () => window.states.push(status.dataset.state);
          new MutationObserver(note).observe(status, { attributes: true });
        }"""
    )
    texts: list[str] = []
    for round_ in range(3):
        network.ask_to_move()
        for number in range(20):  # before, while, and after it moves
            texts.append(f"{round_}.{number}")
            demo.post(room, ALAN, texts[-1])
            ada.wait_for_timeout(20)
        write(ada, f"mine {round_}")
        texts.append(f"mine {round_}")
        expect_messages(ada, *texts)
        assert network.connections == round_ + 2
    assert set(ada.evaluate("window.states")) <= {"online"}


def test_a_lost_reply_makes_no_second_message(open_page: Open) -> None:
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


# Modules by themselves, in a page that is nobody's


@pytest.fixture
def blank(demo: Daemon, browser: BrowserContext) -> Iterator[Page]:
    page = browser.new_page()
    page.goto(f"{demo.url}/healthz")
    yield page
    page.close()


def test_changes_and_pages_come_in_any_order(blank: Page) -> None:
    """Each message once, and as it is now: a page of history is older than a change that overtook it."""
    texts = blank.evaluate("""async () => {
      const { Conversation } = await import("/conversation.js");
      const room = new Conversation(1, 7);
      const message = (id, content, more) => ({ id, content, user_id: 7, ...more });
      const seen = () => room.items().map((item) => item.content);
      room.change(message(5, "five"), true);
      room.begins();
      room.change(message(3, "three, edited"));
      room.pending("a", "mine");
      room.pending("b", "waits");
      const before = seen();
      const mine = message(4, "mine", { client_id: "a" });
      room.page({ messages: [message(3, "three"), mine, message(5, "five")] });
      room.ends();
      room.stored("a", { id: 4, created_at: "2026-01-01T00:00:00Z" });
      room.change({ content: "without an id" }, true);
      return [before, seen()];
    }""")
    assert texts[0] == ["five", "mine", "waits"]
    assert texts[1] == ["three, edited", "mine", "five", "without an id", "waits"]


CLIENT = """async (options) => {
  const { Chat } = await import("/chatd.js");
  const demo = await (await fetch("/demo/token?user=3")).json();
  const chat = new Chat({
    url: `ws://${location.hostname}:${demo.websocket_port}/ws`,
    token: async () => options.token ?? demo.token,
    longestWait: options.longest_wait,
  });
  const got = window.got = { messages: [], events: [], states: [], errors: [] };
  window.chat = chat;
  addEventListener("error", (event) => { got.errors.push(event.message); event.preventDefault(); });
  chat.addEventListener("state", ({ detail }) => got.states.push(detail));
  const room = window.room = chat.join(options.room);
  room.addEventListener("unsubscribed", ({ detail }) => (got.unsubscribed = detail));
  room.addEventListener("message", ({ detail: { seq, content } }) => {
    got.messages.push([seq, room.cursor, content]);
  });
  room.addEventListener("event", ({ detail }) => got.events.push(detail));
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


def test_a_throwing_listener_harms_nothing(demo: Daemon, blank: Page, room: int) -> None:
    blank.evaluate(CLIENT, {"room": room, "hostile": True, "longest_wait": LONGEST_WAIT})
    for text in ("one", "two"):
        demo.post(room, ADA, text)
    wait_until(blank, "got.messages.length === 2")
    reply = blank.evaluate("chat.send(room.id, 'three')")
    assert reply["seq"] == 3
    demo.kill()
    wait_until(blank, "chat.state !== 'online'")
    demo.start()
    wait_until(blank, "chat.state === 'online'")
    blank.evaluate("chat.send(room.id, 'four')")
    wait_until(blank, "got.messages.length === 4")
    got = blank.evaluate("got")
    # The cursor was moved before the listeners were called.
    assert got["messages"] == [[1, 1, "one"], [2, 2, "two"], [3, 3, "three"], [4, 4, "four"]]
    assert any("a bug in the application" in error for error in got["errors"])


def test_a_network_that_breaks_loses_doubles_and_reorders_nothing(
    browser: BrowserContext, daemons: Daemons
) -> None:
    """As `test_javascript.py` has it for Node; the long form is `python -m tests.bad_network --chromium`."""
    daemon = daemons(demo=True, **SETTINGS)
    page = browser.new_page()
    page.goto(f"{daemon.url}/healthz")
    with BadNetwork(daemon.hub_port, life=0.5, seed=20261127) as network:
        verdicts = in_page(page, options(daemon, network, 200))
    page.close()
    assert faults_of(verdicts) == []
    assert sum(network.fates.values()) > 5


def test_an_invalid_token_stops_for_good(blank: Page, room: int) -> None:
    blank.evaluate(CLIENT, {"room": room, "token": "nonsense"})
    states = blank.evaluate("got.states")
    assert [state["state"] for state in states] == ["connecting", "stopped"]
    assert states[-1]["code"] == 4500


def test_refusals_reject_and_do_not_block_what_follows(blank: Page, room: int) -> None:
    blank.evaluate(CLIENT, {"room": room})
    refused = blank.evaluate("""async () => {
      const first = chat.send(room.id, "", {});
      const second = chat.send(room.id, "fine");
      const code = await first.then(() => "accepted", (error) => error.code);
      return [code, (await second).seq];
    }""")
    assert refused == ["bad_request", 1]


def test_other_events_of_a_room_are_passed_on(demo: Daemon, blank: Page, room: int) -> None:
    blank.evaluate(CLIENT, {"room": room})
    demo.request("PUT", f"/api/ws/conversations/{room}/members/{ALAN}")
    wait_until(blank, "got.events.length > 0")
    event = blank.evaluate("got.events[0]")
    assert (event["event"], event["user_id"], event["change"]) == ("member", ALAN, "added")


def test_messages_sent_in_a_burst_keep_their_order(blank: Page, room: int) -> None:
    """More than the rate limit allows at once: what is refused for the moment is not overtaken."""
    blank.evaluate(CLIENT, {"room": room})
    count = SENDS_PER_SECOND * 2 + 10
    blank.evaluate(
        "(count) => Promise.all(Array.from({ length: count }, (_, number) => chat.send(room.id, `${number}`)))",
        count,
    )
    wait_until(blank, "got.messages.length === wanted", count)
    assert [text for _, _, text in blank.evaluate("got.messages")] == [str(number) for number in range(count)]


def test_who_is_here_who_types_and_who_has_read(open_page: Open) -> None:
    ada = open_page(ADA)
    write(ada, "Anybody?")
    expect(ada.locator(".note-text").last).to_have_text("Sent")
    expect(ada.locator("#people")).to_be_hidden()
    grace = open_page(GRACE)
    for page, other in ((ada, "Grace is here"), (grace, "Ada is here")):
        expect(page.locator("#people")).to_have_text(other)
    expect(ada.locator(".note-text").last).to_have_text("Read by Grace")
    grace.get_by_label("Message", exact=True).press_sequentially("Ye")
    expect(ada.locator("#typing")).to_have_text("Grace is typing…")
    grace.get_by_label("Message", exact=True).fill("")
    expect(ada.locator("#typing")).to_have_text("")
    grace.close()
    expect(ada.locator("#people")).to_be_hidden()


def test_reactions_are_given_and_taken_back(open_page: Open) -> None:
    ada, grace = open_page(ADA), open_page(GRACE)
    write(ada, "Cake in the kitchen")
    expect_messages(grace, "Cake in the kitchen")
    grace.locator(".message").hover()
    grace.get_by_role("button", name="React with 🎉").click()
    for page in (ada, grace):
        expect(page.locator(".reaction")).to_have_text("🎉")
    expect(grace.locator(".reaction")).to_have_attribute("aria-pressed", "true")
    ada.locator(".reaction").click()
    for page in (ada, grace):
        expect(page.locator(".reaction")).to_have_text("🎉 2")
    grace.locator(".reaction").click()
    for page in (ada, grace):
        expect(page.locator(".reaction")).to_have_text("🎉")
    expect(ada.locator(".reaction")).to_have_attribute("title", "Ada")
