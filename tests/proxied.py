"""A thousand WebSockets through the shipped nginx for two minutes: python -m tests.proxied [clients] [seconds]

Half of them sit in a room where somebody speaks each second, half hear nothing but chatd's pings. None may be
lost.
"""

from __future__ import annotations

import json
import ssl
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path

import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, wrap_client_stream

from chatd.auth.tokens import Tokens
from tests.daemon import Daemon
from tests.nginx import NAME, Nginx

SECRET = "0123456789012345678901234567890123456789"
BUSY, QUIET = 1, 2
PER_ADDRESS = 20  # clients of one address, so that the shipped limits have nothing to say
AT_ONCE = 20  # handshakes


class Crowd:
    def __init__(self, daemon: Daemon, nginx: Nginx, clients: int) -> None:
        self.daemon, self.nginx, self.clients = daemon, nginx, clients
        self.seen: Counter[str] = Counter()
        self.lost: list[str] = []
        self.ready = self.posted = 0
        self._context = ssl.create_default_context(cafile=nginx.certificate)
        self._tokens = Tokens(SECRET)

    async def run(self, seconds: float) -> None:
        async with trio.open_nursery() as nursery:
            turns = trio.Semaphore(AT_ONCE)
            began = trio.current_time()
            for number in range(self.clients):
                nursery.start_soon(self._client, number, turns)
            while self.ready < self.clients and not self.lost:
                await trio.sleep(0.05)
            print(f"{self.ready} of {self.clients} ready after {trio.current_time() - began:.1f} s")
            ends = trio.current_time() + seconds
            while trio.current_time() < ends:
                await trio.to_thread.run_sync(self.daemon.post, BUSY, 1, f"message {self.posted}")
                self.posted += 1
                await trio.sleep(1)
            await trio.sleep(2)  # the last ones are on their way
            print(f"after {seconds:.0f} s: lost {len(self.lost)} {self.lost[:3]}")
            nursery.cancel_scope.cancel()

    async def _client(self, number: int, turns: trio.Semaphore) -> None:
        address = f"127.0.1.{1 + number // PER_ADDRESS}"
        try:
            async with trio.open_nursery() as nursery:
                async with turns:
                    plain = await trio.open_tcp_stream("127.0.0.1", self.nginx.port, local_address=address)
                    stream = trio.SSLStream(plain, self._context, server_hostname=NAME, https_compatible=True)
                    ws = await wrap_client_stream(nursery, stream, NAME, "/ws")
                    await self._log_in(ws, number)
                await self._listen(ws)
        except* (ConnectionClosed, OSError, trio.BrokenResourceError) as group:
            self.lost.append(repr(group.exceptions[0]))

    async def _log_in(self, ws: WebSocketConnection, number: int) -> None:
        room = BUSY if number % 2 else QUIET
        token = self._tokens.issue(10 + number, 3600)
        await ws.send_message(
            json.dumps({"event": "auth", "ref": 1, "token": token, "rooms": {str(room): None}})
        )
        while json.loads(await ws.get_message())["event"] != "ready":
            pass
        self.ready += 1

    async def _listen(self, ws: WebSocketConnection) -> None:
        while True:
            event = json.loads(await ws.get_message())["event"]
            self.seen[event] += 1
            if event == "ping":
                await ws.send_message('{"event":"pong"}')


def main(clients: int = 1000, seconds: int = 120) -> int:
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        daemon = Daemon(directory, auth__secret=SECRET, limits__trusted_proxies="127.0.0.1").start()
        try:
            (directory / "nginx").mkdir()
            with Nginx(directory / "nginx", daemon.hub_port) as nginx:
                crowd = Crowd(daemon, nginx, clients)
                trio.run(partial(crowd.run, seconds))
        finally:
            daemon.close()
    expected = crowd.posted * (clients // 2)
    heard, pings = crowd.seen["message"], crowd.seen["ping"]
    print(f"posted {crowd.posted}, heard {heard} of {expected}; pings answered: {pings}")
    return int(bool(crowd.lost) or heard != expected)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))
