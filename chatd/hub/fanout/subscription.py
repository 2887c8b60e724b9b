"""A subscription: one connection in one room, with its own cursor. All methods are synchronous.

Only the fanout delivers to it. Only its session settles it.
"""

from __future__ import annotations

import math
from itertools import takewhile
from typing import TYPE_CHECKING

from msgspec import UnsetType

from chatd.core.model import Position
from chatd.hub.fanout.chunks import Chunk
from chatd.hub.fanout.listeners import Listener

if TYPE_CHECKING:
    from chatd.hub.fanout.rooms import Room

BUFFER_BYTES = 256 * 1024  # bytes that a subscription holds while its snapshot is read


class Subscription:
    """One connection in one room. No change with `seq <= cursor` is pushed to it, so a change that arrives
    twice (by replay, by repair, or by Redis from this node itself) is pushed once.

    `mark` is the mark of the change at the cursor: a change that does not follow it is of another history. If
    the mark is not known, `epoch` names the history.

    The subscription buffers from the moment it joins until its snapshot was sent, so that no change between
    the two is lost. It buffers again when its connection is too slow for a change, until it has caught up.
    """

    __slots__ = (
        *("_buffer", "_buffered", "_flat", "_opened", "_try_push", "cursor", "doubted", "entered", "entitled"),
        *("epoch", "joined", "listener", "lost", "mark", "presence", "presence_missed", "room", "visiting"),
    )

    def __init__(self, room: Room, listener: Listener, *, entitled: bool) -> None:
        self.room, self.listener, self.entitled = room, listener, entitled
        self._try_push, self._flat = listener.try_push, listener.flat  # bound here: each delivery needs them
        self.cursor = 0
        self.mark: str | UnsetType | None = None
        self.epoch: str | None = None
        self.joined = True
        self.entered = False  # a snapshot was sent: the client knows that it is in the room
        self.presence = False  # the client has asked for presence
        self.presence_missed = False  # a presence event was dropped, because the client reads too slowly
        self.visiting = False  # its user is counted as a visitor, that is, not as a member
        self.hold()

    @property
    def conversation_id(self) -> int:
        return self.room.conversation_id

    @property
    def buffering(self) -> bool:
        return self._buffer is not None

    def hold(self) -> None:
        """Buffer from now on, because a snapshot is about to be read."""
        self._buffer: list[Chunk | bytes] | None = []  # None: live
        self._buffered = 0
        self.lost = False  # a change was not kept in the buffer
        self.doubted = False  # the snapshot that is being read just now must be read again
        self._opened = self.room.head is not None

    def wait_at(self, position: Position, epoch: str | None) -> None:
        """Buffer without keeping anything, until a snapshot is about to be read: that may take long, and the
        snapshot then has all changes after `position`.
        """
        self.hold()
        self.lost = True
        self.cursor, self.mark, self.epoch = position.after or 0, position.mark, epoch
        self.entered = True

    def wait(self) -> None:
        """The same, from its own cursor."""
        self.wait_at(Position(self.cursor, self.mark), self.epoch)

    def distrust(self) -> None:
        """The snapshot that is being read may be older than a removal: discard the buffer, and have the
        snapshot read again.
        """
        if self._buffer is not None:
            self._buffer.clear()
            self.doubted = True

    def fits(self, seq: int, members_version: int | None = None) -> bool:
        """Whether a snapshot up to `seq`, followed by the buffer since `hold`, has every change, and the user
        may see all of them (see `settle`).
        """
        # If the room was opened meanwhile, no change below the head at that moment was delivered to anybody.
        whole = not self.lost and not self.doubted and (self._opened or seq >= (self.room.opened_at or 0))
        return whole and len(self._allowed(members_version)) == len(self._buffer or ())

    def settle(self, seq: int, mark: str | UnsetType | None = None, members_version: int | None = None) -> None:
        """The snapshot up to `seq` was sent: push the buffer after it. The subscription is live from now on.

        `members_version` is the snapshot's; None if the rights are known otherwise. A buffered change with a
        higher version was committed after a removal of some member, perhaps of this user. It is not pushed,
        and neither are the changes after it.
        """
        held, self._buffer = self._allowed(members_version), None
        self.cursor, self.mark, self.entered = seq, mark, True
        for item in held:
            if isinstance(item, bytes):
                self.announce(item)
            else:
                self.deliver(item)

    def deliver(self, chunk: Chunk) -> bool:
        """Push what is new of a chunk. Returns False if nothing was pushed."""
        if not self.joined:
            return False
        if self._buffer is not None:
            self._keep(chunk, len(chunk.joined))
            return False
        # The usual case first, for speed.
        if chunk.first == self.cursor + 1 and chunk.previous == self.mark and not self._flat:
            if self._try_push(chunk.joined):
                self.cursor, self.mark = chunk.last, chunk.mark
                return True
            self.listener.fall_behind(self)
            return False
        return self._advance(chunk)

    def announce(self, frame: bytes) -> None:
        """Push an event without a seq. It is kept in the buffer if the subscription is buffering."""
        if not self.joined:
            return
        if self._buffer is not None:
            self._keep(frame, len(frame))
        else:
            self.listener.push(frame)

    def offer(self, frame: bytes, *, lasting: bool = False) -> bool:
        """Push an ephemeral event. It is dropped for a slow consumer, and also for a subscription that is
        buffering, unless it is `lasting`.

        Returns False if it was dropped for a slow consumer: a subscription that is buffering is about to get a
        complete answer.
        """
        if not self.joined:
            return True
        if self._buffer is None:
            return self.listener.offer(frame)
        if lasting:
            self._keep(frame, len(frame))
        return True

    def _allowed(self, members_version: int | None) -> list[Chunk | bytes]:
        """Return the buffer up to the first change that is newer than this version of the rights."""
        known = math.inf if members_version is None else members_version
        return list(
            takewhile(lambda one: isinstance(one, bytes) or one.members_version <= known, self._buffer or ())
        )

    def _advance(self, chunk: Chunk) -> bool:
        if chunk.last <= self.cursor:
            return False
        if not chunk.follows(self.cursor, self.mark):  # a change is missing, or the history is another one
            self.listener.resync(self)
            return False
        frames = chunk.after(self.cursor, self._flat)
        if frames and not self._try_push(frames):
            self.listener.fall_behind(self)
            return False
        self.cursor, self.mark = chunk.last, chunk.mark
        return bool(frames)

    def _keep(self, item: Chunk | bytes, size: int) -> None:
        assert self._buffer is not None
        self._buffered += size
        if self._buffered > BUFFER_BYTES:
            self._buffer.clear()
            self.lost = True
        elif not self.lost and not self.doubted:
            self._buffer.append(item)
