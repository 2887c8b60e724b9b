"""Follows a room, also over restarts of the daemon, by the rules of docs/protocol.md §5 and §6: it keeps a
cursor, resumes after a lost connection, and stops at a final close code.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import trio

from chatd.core import backoff
from chatd.ops.client import Connection, Disconnected, Event, connect

RETRY_FIRST, RETRY_MOST = 0.5, 20.0  # seconds; the bound of a random pause, doubled each time
LIVED = 10.0  # seconds after `ready` when the backoff begins from the start
CHANGES = ("message", "message.updated", "message.deleted")

First = Callable[[Connection], Awaitable[None]]


class Refused(Exception):
    """The server refuses, and would refuse a retry. `code` is an error code (docs/errors.md) or a close
    code.
    """

    def __init__(self, code: str | int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Follower:
    """Follows one room. It calls `tell` for each event, and for each change once and in order.

    It calls `log_in` for a new token for each connection, and `notice` with a sentence when the connection is
    lost and when it is restored.
    """

    def __init__(
        self,
        url: str,
        conversation_id: int,
        *,
        log_in: Callable[[], str],
        tell: Callable[[Event], None],
        notice: Callable[[str], None] = lambda sentence: None,
    ) -> None:
        self._url, self._room, self._log_in = url, conversation_id, log_in
        self._tell, self._notice = tell, notice
        self._cursor: int | None = None
        self._mark: str | None = None  # of the change at the cursor, so that the server can compare histories
        self._epoch: str | None = None
        self._asked_at: int | None = None  # the cursor at which missing changes were requested
        self._attempts = 0
        self._troubled = False

    async def run(self, first: First | None = None) -> None:
        """Follow the room until cancelled. `first` is awaited once, with a connection that is in the room.

        Raises Refused.
        """
        while True:
            ready_at: float | None = None
            pause = 0.0
            try:
                async with connect(self._url) as connection:
                    await self._enter(connection, first)
                    first, ready_at = None, trio.current_time()
                    pause = await self._listen(connection)
            except Disconnected as end:
                if end.final:
                    raise Refused(end.code, f"{end} ({end.code})") from None
                self._say_lost(end)
                if ready_at is not None and trio.current_time() - ready_at > LIVED:
                    self._attempts = 0
                pause = backoff.delay(self._attempts, RETRY_FIRST, RETRY_MOST, jitter=(0.0, 1.0))
                self._attempts += 1
            await trio.sleep(pause)

    async def _enter(self, connection: Connection, first: First | None) -> None:
        fields = {"epoch": self._epoch} if self._epoch else {}
        rooms = {str(self._room): {"after": self._cursor, "mark": self._mark}}
        ready = await connection.request("auth", token=self._log_in(), rooms=rooms, **fields)
        if ready["event"] == "error" and ready.get("retryable"):
            raise Disconnected(ready["message"])
        if ready["event"] == "error":
            raise Refused(ready["code"], ready["message"])
        state = ready["rooms"].get(str(self._room))
        while state is None:  # an `unsubscribed` with the reason follows
            self._check_let_in(await connection.next())
        if self._troubled:
            self._troubled = False
            self._notice("Connected again.")
        if first is not None:
            await first(connection)
        self._take_state(state | {"epoch": ready.get("epoch")})

    def _take_state(self, state: Event) -> None:
        """Handle the answer to a subscription: all changes that were missed, or the newest if these are too
        many.
        """
        self._asked_at = None
        known, recovered = self._cursor, state.get("recovered")
        if known is not None:
            if not recovered:
                self._notice("Too many messages were missed: these are the newest.")
            for change in state.get("changes", ()):
                if not recovered or change["seq"] > known:
                    self._tell(change)
        self._cursor, self._mark = state["seq"], state.get("mark")
        self._epoch = state.get("epoch") or self._epoch

    async def _listen(self, connection: Connection) -> float:
        """Handle events until the server asks the client to reconnect. Returns the seconds to wait before."""
        while True:
            event = await connection.next()
            if event["event"] == "reconnect":
                least, most = event["delay"]
                self._say_lost(Disconnected("the server has asked for it"))
                return random.uniform(least, most) / 1000
            self._check_let_in(event)
            if event["event"] == "error":
                self._asked_at = None  # so that the next change after the gap requests the missing ones again
            if event["event"] == "subscribed":
                self._take_state(event)
            elif event["event"] in CHANGES and "seq" in event:
                await self._take_change(connection, event)
            elif event.get("conversation_id") == self._room:
                self._tell(event)

    async def _take_change(self, connection: Connection, event: Event) -> None:
        assert self._cursor is not None
        if event["seq"] == self._cursor + 1:
            # Advanced first, so that the change is not delivered twice if `tell` raises.
            self._cursor, self._mark = event["seq"], event.get("mark")
            self._tell(event)
        elif event["seq"] > self._cursor and self._asked_at != self._cursor:  # one request for each gap
            self._asked_at = self._cursor
            fields = {"after": self._cursor, "mark": self._mark, "epoch": self._epoch}
            await connection.send("subscribe", conversation_id=self._room, **fields)

    def _check_let_in(self, event: Event) -> None:
        if event["event"] == "unsubscribed":
            raise Refused(event["code"], event["message"])

    def _say_lost(self, end: Disconnected) -> None:
        if not self._troubled:
            self._troubled = True
            self._notice(f"Connecting again: {end}{f' ({end.code})' if end.code else ''}.")
