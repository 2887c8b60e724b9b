"""Splits the changes that a client has missed into answers small enough for a slow link. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec.structs import replace

from chatd.core.limits import ANSWER_BYTES
from chatd.hub.fanout.chunks import runs
from chatd.store.read.snapshots import Snapshot, newest

NUMBERS = 128  # bytes by which the numbers, marks and `ref` of two answers may differ in length


def parts(snapshot: Snapshot, overhead: int) -> Iterator[Snapshot]:
    """Split a snapshot into several. The `seq` and `mark` of each are those of its last change, so a client
    that has received only some of them resumes after the last one.

    `overhead`: bytes of an answer without its changes.
    """
    space = max(ANSWER_BYTES - overhead - NUMBERS, ANSWER_BYTES // 2)
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
