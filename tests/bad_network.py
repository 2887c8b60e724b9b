"""chatd.js over a network that delays, cuts and half-closes: python -m tests.bad_network [--chromium]

People talk in one room, each with a connection through `BadNetwork`, in Node or in Chromium. What everybody
holds in the end is compared with what the server has confirmed.
"""

from __future__ import annotations

import json
import random
import socket
import struct
import tempfile
import threading
from collections import Counter
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import click
import trio

from tests.daemon import Daemon
from tests.node import run_script

WEB = Path(__file__).parent / "web"
CLIENT = Path(__file__).parent.parent / "clients" / "js" / "chatd.js"
PEOPLE = 5
ROOM = 1
UP, DOWN = "up", "down"
FATES = (
    *("cut", "reset", "reset the client", "half-close to the client", "half-close to the server"),
    *("silent", "silent downwards", "silent upwards"),
)
SETTINGS: dict[str, Any] = {
    "limits__sends_per_second": 0,
    "limits__connections_per_user": 0,
    "hub__ping_interval": 1,
    "hub__ping_timeout": 1,
}


class BadNetwork:
    """A TCP proxy in a thread of its own. Each connection meets its fate after `life` seconds, on average."""

    def __init__(self, target: int, *, life: float, seed: int) -> None:
        self.fates: Counter[str] = Counter()
        self.port = 0
        self._target, self._life, self._random = target, life, random.Random(seed)
        self._thread = threading.Thread(target=trio.run, args=(self._run,))
        self._started = threading.Event()
        self._token: trio.lowlevel.TrioToken
        self._scope = trio.CancelScope()

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._started.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._token.run_sync_soon(self._scope.cancel)
        self._thread.join()

    async def _run(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listener.socket.getsockname()[1]
        self._started.set()
        with self._scope:
            await trio.serve_listeners(self._carry, [listener])

    async def _carry(self, client: trio.SocketStream) -> None:
        server = await trio.open_tcp_stream("127.0.0.1", self._target)
        line = _Line(client, server, self._random)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(line.pump, UP, client, server)
                nursery.start_soon(line.pump, DOWN, server, client)
                fate = self._random.choice(FATES)
                await trio.sleep(self._random.expovariate(1 / self._life))
                self.fates[fate] += 1
                await line.meet(fate)
                nursery.cancel_scope.cancel()
        finally:
            client.socket.close()
            server.socket.close()


class _Line:
    """One connection through the proxy."""

    def __init__(self, client: trio.SocketStream, server: trio.SocketStream, chance: random.Random) -> None:
        self._client, self._server, self._random = client, server, chance
        self._silent: set[str] = set()

    async def pump(self, way: str, source: trio.SocketStream, target: trio.SocketStream) -> None:
        """In pieces of any size, some of them late. How it ends is the fate's affair."""
        try:
            while data := await source.receive_some(self._random.choice((1, 7, 100, 4096, 65536))):
                if self._random.random() < 0.1:
                    await trio.sleep(self._random.random() ** 3 * 0.1)
                if way in self._silent:
                    await trio.sleep_forever()
                await target.send_all(data)
            await target.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    async def meet(self, fate: str) -> None:
        if fate == "half-close to the client":
            await self._half_close(self._client)
        elif fate == "half-close to the server":
            await self._half_close(self._server)
        elif fate.startswith("silent"):
            ways = {"silent downwards": {DOWN}, "silent upwards": {UP}}
            self._silent = ways.get(fate, {UP, DOWN})
            await trio.sleep(self._random.random() * 3)
        if fate.startswith("reset"):
            self._reset_at_close(self._client)
        if fate == "reset":
            self._reset_at_close(self._server)

    async def _half_close(self, stream: trio.SocketStream) -> None:
        try:
            stream.socket.shutdown(socket.SHUT_WR)
        except OSError:
            return
        await trio.sleep(self._random.random() * 2)

    @staticmethod
    def _reset_at_close(stream: trio.SocketStream) -> None:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def options(daemon: Daemon, network: BadNetwork, messages: int) -> dict[str, Any]:
    """What the workload is told."""
    return {
        "url": f"ws://127.0.0.1:{network.port}/ws",
        "room": ROOM,
        "longestWait": 500,  # ms
        "each": messages // PEOPLE,
        "people": [{"user": user, "token": daemon.token_for(user)} for user in range(1, PEOPLE + 1)],
    }


def in_node(told: dict[str, Any], seconds: float) -> list[dict[str, Any]]:
    script = f"""
    const {{ Chat }} = await import({json.dumps(CLIENT.as_uri())});
    const {{ workload }} = await import({json.dumps((WEB / "workload.mjs").as_uri())});
    console.log(JSON.stringify(await workload(Chat, {json.dumps(told)})));
    process.exit();
    """
    return list(json.loads(run_script(script, seconds)))


def in_page(page: Any, told: dict[str, Any]) -> list[dict[str, Any]]:
    """In a Playwright page of the demo."""
    page.route("**/workload.mjs", lambda route: route.fulfill(path=WEB / "workload.mjs"))
    verdicts = page.evaluate(
        """async (told) => {
          const [{ Chat }, { workload }] = [await import("/chatd.js"), await import("/workload.mjs")];
          return workload(Chat, told);
        }""",
        told,
    )
    return list(verdicts)


def faults_of(verdicts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those who miss something, have it twice or in another order, or were refused."""
    return [
        one
        for one in verdicts
        if any(one[what] for what in ("lost", "doubled", "reordered", "strange", "rejected"))
        or one["state"] == "stopped"
    ]


@click.command()
@click.option("--messages", default=10_000, show_default=True)
@click.option("--life", default=2.5, show_default=True, help="Seconds that a connection lives, on average.")
@click.option("--chromium", is_flag=True, help="In Chromium instead of Node.")
@click.option("--seed", type=int, help="Of all that is random; printed.")
def main(messages: int, life: float, chromium: bool, seed: int | None) -> None:
    """Prints what became of everybody; exit code 1 if anything was lost, doubled or reordered."""
    seed = random.randrange(10**6) if seed is None else seed
    print(f"--seed {seed}")
    daemon = Daemon(Path(tempfile.mkdtemp(prefix="chatd-")), demo=True, **SETTINGS).start()
    try:
        with BadNetwork(daemon.hub_port, life=life, seed=seed) as network:
            told = options(daemon, network, messages)
            verdicts = _in_chromium(daemon, told) if chromium else in_node(told, 3600)
            print(f"{messages} messages, {sum(network.fates.values())} connections: {dict(network.fates)}")
    finally:
        daemon.close()
    for one in verdicts:
        print(json.dumps(one))
    if faults_of(verdicts):
        raise SystemExit(1)


def _in_chromium(daemon: Daemon, told: dict[str, Any]) -> list[dict[str, Any]]:
    from playwright.sync_api import sync_playwright

    from tests.test_page import CHROMIUM, FLAGS

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.goto(f"{daemon.url}/healthz")
        verdicts = in_page(page, told)
        browser.close()
        return verdicts


if __name__ == "__main__":
    main()
