"""Follows a room over restarts of the daemon, by the rules of docs/protocol.md §5 and §6: a cursor, resuming,
and when to stop.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable

import trio

from chatd.core import backoff
from chatd.ops.client import Connection, Disconnected, Event, connect

RETRY_FIRST, RETRY_MOST = 0.5, 20.0  # seconds; a random moment before that, doubled each time
LIVED = 10.0  # seconds past `ready` after which the next trouble is a new one
CHANGES = ("message", "message.updated", "message.deleted")

First = Callable[[Connection], Awaitable[None]]


class Refused(Exception):
    """The server says no, and would again. `code` is one of errors.py, or of a close."""

    def __init__(self, code: str | int, message: str) -> None:
        super().__init__(message)
        self.code = code


class Follower:
    """Follows one room for as long as it can: events go to `tell`, each change once and in order.

    `log_in` gives a fresh token for each connection. `notice` gets a sentence when the connection is lost, and
    when it is back.
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
        self._mark: str | None = None  # of the change at the cursor: proves that it is of the server's history
        self._epoch: str | None = None
        self._asked_at: int | None = None  # the cursor behind which a hole was asked for
        self._attempts = 0
        self._troubled = False

    async def run(self, first: First | None = None) -> None:
        """Until cancelled. `first` is awaited once, with the connection that is in the room.

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
        while state is None:  # not let in, which comes as an event of its own
            self._check_let_in(await connection.next())
        if self._troubled:
            self._troubled = False
            self._notice("Connected again.")
        if first is not None:
            await first(connection)
        self._take_state(state | {"epoch": ready.get("epoch")})

    def _take_state(self, state: Event) -> None:
        """What a (re)subscription brings: all that was missed, or the word that it is too much."""
        self._asked_at = None
        known, recovered = self._cursor, state.get("recovered")
        if known is not None:
            if not recovered:
                self._notice("What was missed cannot be had in one piece: these are the newest messages.")
            for change in state.get("changes", ()):
                if not recovered or change["seq"] > known:
                    self._tell(change)
        self._cursor, self._mark = state["seq"], state.get("mark")
        self._epoch = state.get("epoch") or self._epoch

    async def _listen(self, connection: Connection) -> float:
        """Until the server asks for another connection: in how many seconds to come back."""
        while True:
            event = await connection.next()
            if event["event"] == "reconnect":
                least, most = event["delay"]
                self._say_lost(Disconnected("the server asks to"))
                return random.uniform(least, most) / 1000
            self._check_let_in(event)
            if event["event"] == "error":
                self._asked_at = None  # the next change behind the hole asks again
            if event["event"] == "subscribed":
                self._take_state(event)
            elif event["event"] in CHANGES and "seq" in event:
                await self._take_change(connection, event)
            elif event.get("conversation_id") == self._room:
                self._tell(event)

    async def _take_change(self, connection: Connection, event: Event) -> None:
        assert self._cursor is not None
        if event["seq"] == self._cursor + 1:
            # First: what `tell` raises shall not bring it twice.
            self._cursor, self._mark = event["seq"], event.get("mark")
            self._tell(event)
        elif event["seq"] > self._cursor and self._asked_at != self._cursor:  # once for each hole
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
