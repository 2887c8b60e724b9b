"""chatd with a bug planted, to show that the checker sees it: `python -m tests.faults.planted BUG serve …`.

Each bug replaces functions of chatd by some that break a guarantee. A name that is gone is an error.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import trio
from sqlalchemy import text

from chatd import cli
from chatd.bus import payloads
from chatd.chat.conversations import Conversations
from chatd.core.model import MemberChange
from chatd.hub.fanout import fanout, sweep
from chatd.hub.fanout.chunks import Chunk
from chatd.hub.fanout.fanout import Fanout
from chatd.hub.fanout.repair import Repairs
from chatd.hub.fanout.rooms import Room
from chatd.hub.fanout.subscription import Subscription
from chatd.hub.presence.audience import Audiences
from chatd.store.queues import presence
from chatd.store.read import lookups, snapshots
from chatd.store.write.idempotency import Idempotency
from chatd.store.write.submission import Submission
from chatd.store.write.transaction import Step, Transaction
from chatd.store.write.writer import Writer

BEFORE_COMMIT = 0.3  # seconds, so that a SIGKILL finds it in between
ONE_IN = 50
DROP_INDEX = "ALTER TABLE chat_messages DROP CONSTRAINT IF EXISTS chat_messages_client_id"


def replace(owner: object, name: str, by: Callable[[Any], Any]) -> None:
    """`by` is given the original and returns what takes its place."""
    setattr(owner, name, by(getattr(owner, name)))


def ack_before_commit() -> None:
    """G1: the caller is answered when the rows are written, and the transaction is committed a moment later."""

    def take(original: Any) -> Any:
        def patched(self: Any) -> list[Submission]:
            self.taken = original(self)
            return list(self.taken)

        return patched

    def run(original: Any) -> Any:
        def patched(self: Any, commands: Any, settled: Any = ()) -> Any:
            outcomes, group = original(self, commands, settled)
            answers = iter(outcomes)
            for submission in writers[0].taken:
                trio.from_thread.run_sync(submission.resolve, [next(answers) for _ in submission.commands])
            time.sleep(BEFORE_COMMIT)
            return outcomes, group

        return patched

    def remember(original: Any) -> Any:
        def patched(self: Any, *arguments: Any, **named: Any) -> None:
            original(self, *arguments, **named)
            writers.append(self)

        return patched

    writers: list[Any] = []
    replace(Writer, "__init__", remember)
    replace(Writer, "_take", take)
    replace(Transaction, "run", run)


def no_idempotency() -> None:
    """G2: a retry is not recognised. The index that would refuse it is dropped before anybody can write."""
    replace(Idempotency, "read", lambda original: lambda self, commands, conversations: None)

    def init(original: Any) -> Any:
        def patched(self: Any, engine: Any, **named: Any) -> None:
            with engine.begin() as connection:
                connection.execute(text(DROP_INDEX))
            original(self, engine, **named)

        return patched

    replace(Writer, "__init__", init)


def hole_in_the_log() -> None:
    """G3: now and then a seq is taken and nothing is logged under it."""

    def number(original: Any) -> Any:
        def patched(self: Any, kind: Any, row: Any, command: Any) -> Step:
            if random.randrange(ONE_IN) == 0:
                self._conversations[row["chat_conversation_id"]]["last_seq"] += 1
            step: Step = original(self, kind, row, command)
            row["seq"] = step.seq if row.get("id") is None else row["seq"]
            return step

        return patched

    replace(Transaction, "_number", number)


def deliver_twice() -> None:
    """G4: now and then a subscription is given what it has."""

    def deliver(original: Any) -> Any:
        def patched(self: Any, chunk: Chunk) -> bool:
            delivered: bool = original(self, chunk)
            if delivered and random.randrange(ONE_IN) == 0:
                self._try_push(chunk.joined)
            return delivered

        return patched

    replace(Subscription, "deliver", deliver)


def no_buffering() -> None:
    """G4: what is committed while a snapshot is read is thrown away."""
    replace(Subscription, "_keep", lambda original: lambda self, item, size: None)

    def enter_all(original: Any) -> Any:
        async def patched(self: Any, *arguments: Any) -> Any:
            found = await original(self, *arguments)
            await trio.sleep(0.1)
            return found

        return patched

    replace(Conversations, "enter_all", enter_all)

    def advance(original: Any) -> Any:
        def patched(self: Any, chunk: Chunk) -> Any:
            if chunk.last > self.cursor:  # else the hole is noticed, and mended
                self.cursor = max(self.cursor, chunk.first - 1)
                self.mark = chunk.previous if self.cursor == chunk.first - 1 else self.mark
            return original(self, chunk)

        return patched

    replace(Subscription, "_advance", advance)


def no_hole_repair() -> None:
    """G5: what Redis lost, and this one does lose, is read neither for a hole nor by the sweep."""

    def change_of(original: Any) -> Any:
        return lambda fields: original(fields) if random.randrange(ONE_IN) else None

    replace(payloads, "change_of", change_of)
    replace(Repairs, "soon", lambda original: lambda self, room, wait: None)


def no_revocation() -> None:
    """G6: who is removed goes on listening."""

    def tell_members(original: Any) -> Any:
        async def patched(self: Any, change: MemberChange) -> None:
            room = self._rooms.get(change.conversation_id)
            if room is not None and room.members_version is not None:
                room.members_version = max(room.members_version, change.version)

        return patched

    async def check_nobody(read: Any, room: Any) -> None:
        room.members_version = 2**53

    replace(Fanout, "_tell_members", tell_members)
    for module in (fanout, sweep):
        replace(module, "check_rights", lambda original: check_nobody)


def resume_by_number() -> None:
    """G4: whoever comes back is given what follows its number, whatever history the number is of."""

    def by_number(self: Any, place: Any, position: Any, same_epoch: bool) -> bool:
        return position.after is None or position.after <= place.last_seq

    replace(snapshots._Missed, "is_same", lambda original: by_number)


def drop_what_is_numbered_again() -> None:
    """G4: whoever is connected hears nothing of another history until it has passed the room's head."""
    replace(Room, "_follows", lambda original: lambda self, change: True)
    replace(Room, "_contradicts", lambda original: lambda self, change: False)
    replace(Chunk, "follows", lambda original: lambda self, cursor, mark: cursor + 1 >= self.first)
    replace(lookups, "is_of", lambda original: lambda id, after, mark, heads, marks: True)

    def compare(original: Any) -> Any:
        async def patched(self: Any, room: Any, known: Any, found: Any) -> None:
            await original(self, room, (min(known[0], found.seq), found.mark), found)

        return patched

    replace(sweep.Sweep, "_compare", compare)


def everybody_starts_over() -> None:
    """Whoever comes back with a cursor is told to start over."""

    def nobody(self: Any, place: Any, position: Any, same_epoch: bool) -> bool:
        return position.after is None

    replace(snapshots._Missed, "is_same", lambda original: nobody)


def dead_node_stays_online() -> None:
    """G9: what a node had that is gone is removed, and nobody puts it into doubt."""

    def end(original: Any) -> Any:
        def patched(*arguments: Any) -> Any:
            with patched_doubt():
                return original(*arguments)

        return patched

    @contextmanager
    def patched_doubt() -> Iterator[None]:
        before, presence._doubt = presence._doubt, lambda *_: None
        try:
            yield
        finally:
            presence._doubt = before

    replace(presence, "_end", end)


def nobody_is_seen_to_go() -> None:
    """G9: clients hear of who comes, and not of who goes."""

    def changed(original: Any) -> Any:
        def patched(self: Any, change: Any) -> None:
            if change.present:
                original(self, change)

        return patched

    replace(Audiences, "changed", changed)


BUGS = {
    function.__name__.replace("_", "-"): function
    for function in (
        ack_before_commit,
        no_idempotency,
        hole_in_the_log,
        deliver_twice,
        no_buffering,
        no_hole_repair,
        no_revocation,
        dead_node_stays_online,
        nobody_is_seen_to_go,
        resume_by_number,
        drop_what_is_numbered_again,
        everybody_starts_over,
    )
}


def main(arguments: Sequence[str]) -> None:
    BUGS[arguments[0]]()
    cli.main(arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
