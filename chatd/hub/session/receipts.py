"""A connection's read and delivered cursors: collected, and written at most three times a second
(debounced).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import trio
from msgspec import Struct

from chatd.chat.chat import Chat
from chatd.core.errors import ChatError, Unavailable
from chatd.core.model import Identity
from chatd.core.protocol import Delivered, Read
from chatd.hub.session.requests import Requests
from chatd.store.write.submission import Outcome

EVERY = 1 / 3  # seconds between two writes of one connection


class _Waiting(Struct):
    """The cursors to write for one conversation, and the `ref`s of the requests that get a reply."""

    read: int = 0
    delivered: int = 0
    refs: list[Any] = []


class Receipts:
    """The receipts that wait to be written. The rate of requests bounds how many these are."""

    __slots__ = ("_answer", "_chat", "_nursery", "_requests", "_waiting", "_written_at")

    def __init__(
        self,
        chat: Chat,
        nursery: trio.Nursery,
        requests: Requests,
        answer: Callable[[Any, ChatError | None], None],
    ) -> None:
        """`answer(ref, error)` replies to one request."""
        self._chat, self._nursery, self._requests, self._answer = chat, nursery, requests, answer
        self._waiting: dict[int, _Waiting] = {}
        self._written_at = -EVERY

    def note(self, command: Read | Delivered, identity: Identity) -> None:
        begin = not self._waiting
        one = self._waiting.setdefault(command.conversation_id, _Waiting(refs=[]))
        if isinstance(command, Read):
            one.read = max(one.read, command.id)
        else:
            one.delivered = max(one.delivered, command.id)
        if command.ref is not None:
            one.refs.append(command.ref)
        if begin and trio.current_time() - self._written_at >= EVERY:
            self.write(identity)
        elif begin:
            self._nursery.start_soon(self._write_later, identity)

    async def _write_later(self, identity: Identity) -> None:
        await trio.sleep_until(self._written_at + EVERY)
        self.write(identity)

    def write(self, identity: Identity) -> None:
        """Submit the waiting receipts to the writer. Synchronous, so that it also works at a connection's
        end.
        """
        if not self._waiting:
            return
        waiting, self._waiting = self._waiting, {}
        self._written_at = trio.current_time()
        rights = self._chat.conversations.rights
        moves = [
            self._chat.receipts.move(id, identity.user_id, one.read, one.delivered, rights(identity, id))
            for id, one in waiting.items()
        ]

        def written(outcomes: Sequence[Outcome]) -> None:
            self._requests.written()
            for one, outcome in zip(waiting.values(), outcomes, strict=True):
                error = outcome if isinstance(outcome, ChatError) else None
                for ref in one.refs or [None]:
                    self._answer(ref, error)

        self._requests.submitted()
        try:
            self._chat.receipts.submit(moves, written)
        except Unavailable as error:
            written([error] * len(moves))
