"""The way of some clients to chatd: a TCP proxy that can be cut, and slowed down to what bad radio links give.

To chatd a slow link looks as one does: a small window, which opens as slowly as the bytes get through.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from math import inf

import trio

BUFFER_BYTES = 16 * 1024  # what is under way to a client, in the kernel
# What the kernel takes from chatd ahead of the link. The far end of a real link acknowledges every segment; the
# kernel does it in steps of about half of its buffer. With 16 KiB that was one step in 2.5 s at 10 KB/s.
AHEAD_BYTES = 2 * 1024
CHUNKS = 10  # reads a second of a slow link
READ_BYTES = 64 * 1024


class Links:
    """One port for each of `targets`. `rate` is in bytes a second to each client; the way back is always quick.

    `broken` counts links that chatd has reset, not those that `cut` or a client ended.
    """

    def __init__(self, targets: Sequence[int]) -> None:
        self._targets = targets
        self._links: set[trio.CancelScope] = set()
        self.ports: list[int] = []
        self.rate = inf
        self.closed = False
        self.opened = self.broken = 0
        self.passed = 0  # bytes to clients

    async def run(self, *, task_status: trio.TaskStatus[None]) -> None:
        async with trio.open_nursery() as nursery:
            for target in self._targets:
                listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
                self.ports.append(listeners[0].socket.getsockname()[1])
                nursery.start_soon(trio.serve_listeners, self._handler(target), listeners)
            task_status.started()

    def cut(self) -> None:
        """End all links, and take no more until `open`."""
        self.closed = True
        for link in self._links:
            link.cancel()

    def open(self) -> None:
        self.closed = False
        self.opened = self.broken = self.passed = 0

    @property
    def live(self) -> int:
        return len(self._links)

    def _handler(self, target: int) -> Callable[[trio.SocketStream], Awaitable[None]]:
        async def handle(near: trio.SocketStream) -> None:
            if not self.closed:
                try:
                    await self._link(near, target)
                except* (OSError, trio.BrokenResourceError, trio.ClosedResourceError):
                    pass

        return handle

    async def _link(self, near: trio.SocketStream, target: int) -> None:
        far_socket = trio.socket.socket()
        far_socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, AHEAD_BYTES)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER_BYTES)
        with far_socket, trio.CancelScope() as scope:
            await far_socket.connect(("127.0.0.1", target))
            far = trio.SocketStream(far_socket)
            self._links.add(scope)
            self.opened += 1
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._up, near, far, nursery.cancel_scope)
                    nursery.start_soon(self._down, far, near, nursery.cancel_scope)
            finally:
                self._links.discard(scope)

    async def _up(self, near: trio.SocketStream, far: trio.SocketStream, link: trio.CancelScope) -> None:
        while data := await near.receive_some(READ_BYTES):
            await far.send_all(data)
        link.cancel()

    async def _from_chatd(self, far: trio.SocketStream) -> bytes:
        try:
            return bytes(await far.receive_some(self._most()))
        except trio.BrokenResourceError:
            self.broken += 1
            raise

    async def _down(self, far: trio.SocketStream, near: trio.SocketStream, link: trio.CancelScope) -> None:
        while data := await self._from_chatd(far):
            await near.send_all(data)
            self.passed += len(data)
            await trio.sleep(len(data) / self.rate)
        link.cancel()

    def _most(self) -> int:
        return READ_BYTES if self.rate == inf else max(1, int(self.rate / CHUNKS))
