"""What somebody has missed of a room, in answers that a slow link can carry. Pure."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from chatd.core.limits import ANSWER_BYTES
from chatd.hub.fanout.chunks import runs
from chatd.store.read.snapshots import Snapshot, newest

NUMBERS = 128  # bytes by which numbers, marks and a `ref` of one answer may be longer than those of another


def parts(snapshot: Snapshot, around: int) -> Iterator[Snapshot]:
    """One snapshot as several, each up to the last change that it holds. `around`: bytes of an answer without.

    A client that has had some of them stands where the last of these ends, whatever becomes of the rest.
    """
    space = max(ANSWER_BYTES - around - NUMBERS, ANSWER_BYTES // 2)
    if not snapshot.recovered:
        kept = newest(snapshot.changes, space) or snapshot.changes[-1:]
        yield replace(snapshot, changes=kept, has_more=snapshot.has_more or len(kept) < len(snapshot.changes))
        return
    last: Snapshot | None = None
    for run in runs(snapshot.changes, space):
        if last is not None:
            yield last
        last = replace(snapshot, seq=run[-1].seq, mark=run[-1].mark, changes=run)
    yield replace(snapshot, changes=last.changes if last is not None else [])
