"""The outbox on real sockets: order, partial writes, the bound of a slow reader, unfinished messages."""

from __future__ import annotations

import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from chatd.hub.connection.send_queue import UNFINISHED_READS, SendQueue

LIMIT = 64 * 1024


def pair(*, small: bool = False) -> tuple[trio.SocketStream, trio.SocketStream]:
    """Two ends of a TCP connection; small ones have buffers of a few KiB."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        if small:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        client = socket.create_connection(listening.getsockname())
        server, _ = listening.accept()
    if small:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048)
    ours, theirs = (trio.SocketStream(trio.socket.from_stdlib_socket(end)) for end in (client, server))
    return ours, theirs


async def read_exactly(stream: trio.SocketStream, size: int) -> bytes:
    found = b""
    with trio.fail_after(5):
        while len(found) < size:
            found += await stream.receive_some(size - len(found))
    return found


async def test_a_push_is_written_at_once_and_needs_no_task(nursery: trio.Nursery) -> None:
    ours, theirs = pair()
    async with ours, theirs:
        outbox = SendQueue(ours, nursery, unfinished_bytes=1000)
        tasks = len(nursery.child_tasks)
        outbox.push(b"one")
        outbox.push(b"two")
        assert await read_exactly(theirs, 6) == b"onetwo"
        assert (outbox.queued, len(nursery.child_tasks)) == (0, tasks)


async def test_what_the_kernel_does_not_take_follows_in_order(nursery: trio.Nursery) -> None:
    ours, theirs = pair(small=True)
    async with ours, theirs:
        outbox = SendQueue(ours, nursery, unfinished_bytes=1000, limit=10 * LIMIT)
        frames = [bytes([number]) * 1777 for number in range(200)]
        for frame in frames[:150]:
            outbox.push(frame)
        assert outbox.queued > 0
        await wait_all_tasks_blocked()
        for frame in frames[150:]:
            outbox.push(frame)
        assert await read_exactly(theirs, 200 * 1777) == b"".join(frames)
        await wait_all_tasks_blocked()
        assert outbox.queued == 0
        outbox.push(b"and at once again")
        assert await read_exactly(theirs, 17) == b"and at once again"


async def test_a_cancelled_flush_leaves_no_half_frame_behind_a_whole_one() -> None:
    """Whoever is cancelled, bytes go out in the order of the pushes or not at all."""
    ours, theirs = pair(small=True)
    async with ours, theirs:
        async with trio.open_nursery() as nursery:
            outbox = SendQueue(ours, nursery, unfinished_bytes=1000, limit=10 * LIMIT)
            frames = [bytes([number]) * 1000 for number in range(100)]
            for frame in frames:
                outbox.push(frame)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await ours.aclose()
        got = b""
        with trio.fail_after(5):
            while chunk := await theirs.receive_some(65536):
                got += chunk
        assert b"".join(frames).startswith(got)


async def test_past_the_limit_a_slow_reader_is_cut(nursery: trio.Nursery) -> None:
    """G8: it costs the limit and one frame at most, and the peer sees its connection end."""
    ours, theirs = pair(small=True)
    async with ours, theirs:
        outbox = SendQueue(ours, nursery, unfinished_bytes=1000, limit=LIMIT)
        most = 0
        for _ in range(1000):
            outbox.push(b"x" * 1000)
            most = max(most, outbox.queued)
        assert outbox.cut
        assert outbox.too_slow
        assert most <= LIMIT + 1000
        assert outbox.queued == 0
        with trio.fail_after(5):
            while await theirs.receive_some(65536):
                pass
        outbox.push(b"ignored")
        with pytest.raises(trio.BrokenResourceError):
            await outbox.send_all(b"refused")


async def test_what_may_be_left_out_is_left_out_past_half_of_the_limit(nursery: trio.Nursery) -> None:
    """G8: messages keep their place, and the connection its life, for longer."""
    ours, theirs = pair(small=True)
    async with ours, theirs:
        outbox = SendQueue(ours, nursery, unfinished_bytes=1000, limit=LIMIT)
        outbox.offer(b"typing")
        assert await read_exactly(theirs, 6) == b"typing"
        sent = b""
        while not outbox.congested:
            outbox.push(b"m" * 1000)
            sent += b"m" * 1000
        queued = outbox.queued
        for _ in range(1000):
            outbox.offer(b"typing" * 100)
        assert outbox.queued == queued
        assert not outbox.cut
        outbox.push(b"a message")
        assert await read_exactly(theirs, len(sent) + 9) == sent + b"a message"
        await wait_all_tasks_blocked()
        outbox.offer(b"typing again")
        assert await read_exactly(theirs, 12) == b"typing again"


async def test_nothing_more_is_read_for_a_peer_that_does_not_read(nursery: trio.Nursery) -> None:
    ours, theirs = pair(small=True)
    async with ours, theirs:
        outbox = SendQueue(ours, nursery, unfinished_bytes=1000, limit=LIMIT)
        while not outbox.congested:
            outbox.push(b"x" * 1000)
        waited = trio.Event()

        async def wait() -> None:
            await outbox.uncongested()
            waited.set()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not waited.is_set()
        with trio.fail_after(5):
            while not waited.is_set():
                await theirs.receive_some(1000)
        assert not outbox.congested


async def test_a_peer_that_vanished_cuts_quietly(nursery: trio.Nursery) -> None:
    ours, theirs = pair()
    async with ours:
        outbox = SendQueue(ours, nursery, unfinished_bytes=1000)
        theirs.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await theirs.aclose()
        with trio.fail_after(5):
            while not outbox.cut:
                outbox.push(b"x")
                await trio.lowlevel.checkpoint()
        assert not outbox.too_slow


async def test_too_much_without_a_finished_message_ends_the_connection(nursery: trio.Nursery) -> None:
    ours, theirs = pair()
    async with ours, theirs:
        outbox = SendQueue(ours, nursery, unfinished_bytes=1000)
        for _ in range(10):
            await theirs.send_all(b"x" * 900)
            await read_exactly(outbox, 900)  # type: ignore[arg-type]
            outbox.message_finished()
        await theirs.send_all(b"x" * 1001)
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            while True:
                await outbox.receive_some(100)
        assert outbox.cut


async def test_pings_and_pongs_are_no_unfinished_messages(nursery: trio.Nursery) -> None:
    """A client that only pings, or only answers pings, may do so for ever."""
    ours, theirs = pair()
    async with ours, theirs:
        outbox = SendQueue(ours, nursery, unfinished_bytes=1000)
        for _ in range(UNFINISHED_READS + 100):
            await theirs.send_all(b"\x89\x84maskping")
            assert await outbox.receive_some(4096) == b"\x89\x84maskping"
            await outbox.send_all(b"\x8a\x04ping")
        for _ in range(UNFINISHED_READS + 100):
            outbox.expect_pong(b"\x89\x00")
            await theirs.send_all(b"\x8a\x80mask")
            await outbox.receive_some(4096)
        assert not outbox.cut


async def test_a_goodbye_waits_for_a_slow_peer_and_not_for_a_silent_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is queued before a goodbye is sent as long as the peer takes some of it."""
    monkeypatch.setattr("chatd.hub.connection.send_queue.LINGER_PAUSE", 0.3)
    for reads in (True, False):
        ours, theirs = pair(small=True)
        async with ours, theirs:
            async with trio.open_nursery() as connection:
                outbox = SendQueue(ours, connection, unfinished_bytes=1000, limit=10 * LIMIT)
                await outbox.send_all(b"x" * LIMIT)
                assert outbox.queued
                connection.cancel_scope.cancel()
            with trio.fail_after(5):
                async with trio.open_nursery() as lingering:
                    lingering.start_soon(outbox.linger)
                    got = 0
                    while reads and (data := await theirs.receive_some(LIMIT // 2)):
                        got += len(data)
                        await trio.sleep(0.01)
                    await theirs.send_eof()
            assert got == (LIMIT if reads else 0)
            assert bool(outbox.queued) is not reads
