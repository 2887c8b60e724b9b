"""chatd with an error that nobody foresaw: `python -m tests.unforeseen MODULE:CLASS.METHOD serve`.

The method raises once the daemon is ready. From then on a thread of the publisher waits for ever.
"""

from __future__ import annotations

import sys
import threading
import time
from importlib import import_module
from typing import Any

import trio

from chatd import cli
from chatd.daemon.lifecycle import Daemon
from chatd.store.queues.outbox import Outbox

AFTER = 1.0  # seconds after it is ready: all are in the middle of their work


def main() -> None:
    target = sys.argv.pop(1)
    ready = threading.Event()
    place, _, path = target.partition(":")
    owner = getattr(import_module(place), path.partition(".")[0])
    name = path.rpartition(".")[2]
    original = getattr(owner, name)

    def check() -> None:
        if ready.is_set():
            raise LookupError("planted")

    if "_read" in name or "_listen" in name:  # in a thread

        def planted(self: Any, *arguments: Any) -> Any:
            pause(ready)
            check()
            return original(self, *arguments)

    else:

        async def planted(self: Any, *arguments: Any, **named: Any) -> Any:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(raise_when_ready, ready)
                await original(self, *arguments, **named)

    setattr(owner, name, planted)
    told = Daemon._tell_ready

    def tell_ready(self: Daemon) -> None:
        told(self)
        ready.set()

    Daemon._tell_ready = tell_ready  # type: ignore[method-assign]
    expire = Outbox._backlog

    def hang(self: Any) -> Any:
        while ready.is_set():
            time.sleep(1)
        return expire(self)

    Outbox._backlog = hang  # type: ignore[method-assign]
    cli.main()


def pause(ready: threading.Event) -> None:
    ready.wait(60)
    time.sleep(AFTER)


async def raise_when_ready(ready: threading.Event) -> None:
    while not ready.is_set():
        await trio.sleep(0.05)
    await trio.sleep(AFTER)
    raise LookupError("planted")


main()
