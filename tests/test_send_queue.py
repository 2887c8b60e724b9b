"""The stream on real sockets: order, partial writes, the bound of a slow reader, unfinished messages."""

from __future__ import annotations

import socket

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from chatd.hub.connection.stream import UNFINISHED_READS, PeerStream

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
        stream = PeerStream(ours, nursery, unfinished_bytes=1000)
        tasks = len(nursery.child_tasks)
        stream.push(b"one")
        stream.push(b"two")
        assert await read_exactly(theirs, 6) == b"onetwo"
        assert (stream.queued, len(nursery.child_tasks)) == (0, tasks)


async def test_what_the_kernel_does_not_take_follows_in_order(nursery: trio.Nursery) -> None:
    ours, theirs = pair(small=True)
    async with ours, theirs:
        stream = PeerStream(ours, nursery, unfinished_bytes=1000, limit=10 * LIMIT)
        frames = [bytes([number]) * 1777 for number in range(200)]
        for frame in frames[:150]:
            stream.push(frame)
        assert stream.queued > 0
        await wait_all_tasks_blocked()
        for frame in frames[150:]:
            stream.push(frame)
        assert await read_exactly(theirs, 200 * 1777) == b"".join(frames)
        await wait_all_tasks_blocked()
        assert stream.queued == 0
        stream.push(b"and at once again")
        assert await read_exactly(theirs, 17) == b"and at once again"


async def test_a_cancelled_flush_leaves_no_half_frame_behind_a_whole_one() -> None:
    """Whoever is cancelled, bytes go out in the order of the pushes or not at all."""
    ours, theirs = pair(small=True)
    async with ours, theirs:
        async with trio.open_nursery() as nursery:
            stream = PeerStream(ours, nursery, unfinished_bytes=1000, limit=10 * LIMIT)
            frames = [bytes([number]) * 1000 for number in range(100)]
            for frame in frames:
                stream.push(frame)
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
        stream = PeerStream(ours, nursery, unfinished_bytes=1000, limit=LIMIT)
        most = 0
        for _ in range(1000):
            stream.push(b"x" * 1000)
            most = max(most, stream.queued)
        assert stream.cut
        assert stream.too_slow
        assert most <= LIMIT + 1000
        assert stream.queued == 0
        with trio.fail_after(5):
            while await theirs.receive_some(65536):
                pass
        stream.push(b"ignored")
        with pytest.raises(trio.BrokenResourceError):
            await stream.send_all(b"refused")


async def test_what_may_be_left_out_is_left_out_past_half_of_the_limit(nursery: trio.Nursery) -> None:
    """G8: messages keep their place, and the connection its life, for longer."""
    ours, theirs = pair(small=True)
    async with ours, theirs:
        stream = PeerStream(ours, nursery, unfinished_bytes=1000, limit=LIMIT)
        stream.offer(b"typing")
        assert await read_exactly(theirs, 6) == b"typing"
        sent = b""
        while not stream.congested:
            stream.push(b"m" * 1000)
            sent += b"m" * 1000
        queued = stream.queued
        for _ in range(1000):
            stream.offer(b"typing" * 100)
        assert stream.queued == queued
        assert not stream.cut
        stream.push(b"a message")
        assert await read_exactly(theirs, len(sent) + 9) == sent + b"a message"
        await wait_all_tasks_blocked()
        stream.offer(b"typing again")
        assert await read_exactly(theirs, 12) == b"typing again"


async def test_nothing_more_is_read_for_a_peer_that_does_not_read(nursery: trio.Nursery) -> None:
    ours, theirs = pair(small=True)
    async with ours, theirs:
        stream = PeerStream(ours, nursery, unfinished_bytes=1000, limit=LIMIT)
        while not stream.congested:
            stream.push(b"x" * 1000)
        waited = trio.Event()

        async def wait() -> None:
            await stream.uncongested()
            waited.set()

        nursery.start_soon(wait)
        await wait_all_tasks_blocked()
        assert not waited.is_set()
        with trio.fail_after(5):
            while not waited.is_set():
                await theirs.receive_some(1000)
        assert not stream.congested


async def test_a_peer_that_vanished_cuts_quietly(nursery: trio.Nursery) -> None:
    ours, theirs = pair()
    async with ours:
        stream = PeerStream(ours, nursery, unfinished_bytes=1000)
        theirs.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await theirs.aclose()
        with trio.fail_after(5):
            while not stream.cut:
                stream.push(b"x")
                await trio.lowlevel.checkpoint()
        assert not stream.too_slow


async def test_too_much_without_a_finished_message_ends_the_connection(nursery: trio.Nursery) -> None:
    ours, theirs = pair()
    async with ours, theirs:
        stream = PeerStream(ours, nursery, unfinished_bytes=1000)
        for _ in range(10):
            await theirs.send_all(b"x" * 900)
            await read_exactly(stream, 900)  # type: ignore[arg-type]
            stream.message_finished()
        await theirs.send_all(b"x" * 1001)
        with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
            while True:
                await stream.receive_some(100)
        assert stream.cut


async def test_pings_and_pongs_are_no_unfinished_messages(nursery: trio.Nursery) -> None:
    """A client that only pings, or only answers pings, may do so for ever."""
    ours, theirs = pair()
    async with ours, theirs:
        stream = PeerStream(ours, nursery, unfinished_bytes=1000)
        for _ in range(UNFINISHED_READS + 100):
            await theirs.send_all(b"\x89\x84maskping")
            assert await stream.receive_some(4096) == b"\x89\x84maskping"
            await stream.send_all(b"\x8a\x04ping")
        for _ in range(UNFINISHED_READS + 100):
            stream.expect_pong(b"\x89\x00")
            await theirs.send_all(b"\x8a\x80mask")
            await stream.receive_some(4096)
        assert not stream.cut


async def test_a_reply_that_is_late_for_the_nursery_is_sent_in_the_lingering_close() -> None:
    """A command may be committed when its connection has ended but for the last bytes."""
    ours, theirs = pair(small=True)
    async with ours, theirs:
        async with trio.open_nursery() as connection:
            stream = PeerStream(ours, connection, unfinished_bytes=1000, limit=10 * LIMIT)
            stream.answered = True
            stream.push(b"x" * LIMIT)
            connection.cancel_scope.cancel()
        got = b""
        with trio.fail_after(5):
            async with trio.open_nursery() as lingering:
                lingering.start_soon(stream.linger)
                await wait_all_tasks_blocked()
                stream.reply(b"the answer")
                while data := await theirs.receive_some(LIMIT):
                    got += data
                await theirs.send_eof()
        assert got == b"x" * LIMIT + b"the answer"


async def test_a_goodbye_waits_for_a_slow_peer_and_not_for_a_silent_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is queued before a goodbye is sent as long as the peer takes some of it."""
    monkeypatch.setattr("chatd.hub.connection.stream.LINGER_PAUSE", 0.3)
    for reads in (True, False):
        ours, theirs = pair(small=True)
        async with ours, theirs:
            async with trio.open_nursery() as connection:
                stream = PeerStream(ours, connection, unfinished_bytes=1000, limit=10 * LIMIT)
                await stream.send_all(b"x" * LIMIT)
                assert stream.queued
                connection.cancel_scope.cancel()
            with trio.fail_after(5):
                async with trio.open_nursery() as lingering:
                    lingering.start_soon(stream.linger)
                    got = 0
                    while reads and (data := await theirs.receive_some(LIMIT // 2)):
                        got += len(data)
                        await trio.sleep(0.01)
                    await theirs.send_eof()
            assert got == (LIMIT if reads else 0)
            assert bool(stream.queued) is not reads
