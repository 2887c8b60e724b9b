"""chatd.js in Node: by itself against a scripted server, then with a daemon behind a network that breaks.

Those against the scripted server are in `tests/web/*.test.mjs`. The examples of docs/javascript.md run, too.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.bad_network import CLIENT, SETTINGS, BadNetwork, faults_of, in_node, options
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.node import NODE, run_script

pytestmark = pytest.mark.service

WEB = Path(__file__).parent / "web"
NAME = re.compile(r'^\s*test\("([^"]+)"', re.MULTILINE)
EXAMPLES = re.findall(
    r"^```js\n(.+?)^```", (Path(__file__).parent.parent / "docs" / "javascript.md").read_text(), re.M | re.S
)
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


def test_a_network_that_breaks_loses_doubles_and_reorders_nothing(daemons: Daemons) -> None:
    """Cut, reset, half-closed and silent in either way; the long form is `python -m tests.bad_network`."""
    daemon = daemons(demo=True, **SETTINGS)
    with BadNetwork(daemon.hub_port, life=0.3, seed=20261127) as network:
        verdicts = in_node(options(daemon, network, 300), 90)
    assert faults_of(verdicts) == []
    assert sum(network.fates.values()) > 10


def test_a_database_that_is_put_back_replaces_what_is_held(daemons: Daemons) -> None:
    """The new history has passed the client's cursor when it comes back: only the mark can tell."""
    daemon = daemons(rooms__access="open")
    for number in range(3):
        daemon.post(1, 8, f"kept {number}")
    daemon.stop()
    saved = {path: path.read_bytes() for path in daemon.directory.glob("chatd.db*")}
    daemon.start()
    for number in range(3):
        daemon.post(1, 8, f"lost {number}")
    script = f"""
    import {{ setTimeout as sleep }} from "node:timers/promises";
    const {{ Chat }} = await import({json.dumps(CLIENT.as_uri())});
    const token = async () => {json.dumps(daemon.token_for(5))};
    const chat = new Chat({{ url: {json.dumps(daemon.ws_url)}, token, longestWait: 200 }});
    let held = new Map();
    const room = chat.join(1, {{ after: 0 }});
    room.addEventListener("message", ({{ detail }}) => held.set(detail.seq, detail.content));
    room.addEventListener("reset", ({{ detail }}) => {{
      held = new Map(detail.messages.map(({{ seq, content }}) => [seq, content]));
    }});
    chat.connect();
    setTimeout(() => process.exit(1), 120_000);
    for (const head of [6, 9]) {{
      while (room.cursor !== head || chat.state !== "online") await sleep(10);
      console.log(JSON.stringify([...held.values()]));
    }}
    process.exit();
    """
    with subprocess.Popen([NODE, "--input-type=module", "--eval", script], stdout=subprocess.PIPE) as client:
        assert client.stdout is not None
        try:
            kept = [f"kept {number}" for number in range(3)]
            assert json.loads(client.stdout.readline()) == kept + [f"lost {number}" for number in range(3)]
            client.send_signal(signal.SIGSTOP)
            daemon.kill()
            for path in daemon.directory.glob("chatd.db*"):
                path.unlink()
            for path, content in saved.items():
                path.write_bytes(content)
            daemon.start()
            other = [f"other {number}" for number in range(6)]
            for text in other:
                daemon.post(1, 8, text)
            client.send_signal(signal.SIGCONT)
            assert json.loads(client.stdout.readline()) == kept + other
        finally:
            client.kill()


# The examples of docs/javascript.md


def test_the_first_example_talks(daemon: Daemon, conversation: int) -> None:
    """As it stands but for its addresses, with the functions that are the application's."""
    example = (
        EXAMPLES[0]
        .replace("/js/chatd.js", CLIENT.as_uri())
        .replace("wss://chat.example.com/ws", daemon.ws_url)
        .replace("(1", f"({conversation}")
    )
    printed = run_script(
        f"""
        import {{ setTimeout as sleep }} from "node:timers/promises";
        const shown = [], show = ({{ content }}) => shown.push(content);
        const showInstead = () => {{}}, leave = () => {{}}, showState = () => {{}};
        const token = {json.dumps(daemon.token_for(5))};
        globalThis.fetch = async (path) => new Response(path === "/chat/token" ? token : null);
        {example}
        while (!shown.length) await sleep(10);
        console.log(JSON.stringify([shown, chat.userId]));
        process.exit();
        """,
        30,
    )
    assert json.loads(printed) == [["Hello"], 5]


def test_the_example_of_a_first_page_has_no_gap(daemon: Daemon, conversation: int) -> None:
    """While each page is on its way more is posted, and the oldest message of the page is edited."""
    for first in range(0, 400, 100):
        messages = [
            {"conversation_id": conversation, "sender_id": 8, "content": f"{number}"}
            for number in range(first, first + 100)
        ]
        daemon.request("POST", "/api/ws/messages/batch", {"messages": messages})
    script = f"""
    import {{ setTimeout as sleep }} from "node:timers/promises";
    const {{ Chat }} = await import({json.dumps(CLIENT.as_uri())});
    const make = (token) => new Chat({{ url: {json.dumps(daemon.ws_url)}, token: async () => token }});
    const chat = make({json.dumps(daemon.token_for(5))}), other = make({json.dumps(daemon.token_for(8))});
    const connected = (one) => {{
      one.connect();
      return new Promise((done) => one.addEventListener("state", () => one.state === "online" && done()));
    }};
    await Promise.all([connected(chat), connected(other)]);
    {EXAMPLES[1].replace("export ", "")}
    const id = {conversation}, edited = new Set(), history = chat.history.bind(chat);
    let posted = 400;
    chat.history = async (...asked) => {{
      const page = await history(...asked), [oldest] = page.messages;
      edited.add(oldest.content);
      await other.edit(id, oldest.id, `${{oldest.content}}, edited`);
      for (let count = 0; count < 5; count++) await other.send(id, `${{posted++}}`);
      return page;
    }};
    const open = await openRoom(chat, id);
    while (open.hasMore) await open.earlier();
    while (open.messages.size < posted) await sleep(10);
    const texts = [...open.messages].sort(([a], [b]) => a - b).map(([, {{ content }}]) => content);
    console.log(JSON.stringify([texts, [...edited]]));
    process.exit();
    """
    texts, edited = json.loads(run_script(script, 30))
    numbers = [str(number) for number in range(len(texts))]
    assert texts == [f"{number}, edited" if number in edited else number for number in numbers]
    assert (len(texts), len(edited)) == (440, 8)
