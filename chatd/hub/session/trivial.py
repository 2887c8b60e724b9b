"""The trivial client: its URL says who it is and which conversation it wants. It hears messages alone.

    /ws?token=…&conversation_id=1

Nothing but the answer to its handshake tells it that it is in, so whatever is committed after that must reach
it. That is why it is logged in, and its room is entered, before the handshake is answered.
"""

from __future__ import annotations

import trio

from chatd.core.errors import BadRequest, ChatError, Close, Final, NotFound, Unavailable
from chatd.core.limits import MAX_ID
from chatd.hub.admission.registry import Handshake
from chatd.hub.fanout.rooms import Subscription
from chatd.hub.services import Line, Services
from chatd.hub.session.refusals import LOGIN_ERRORS
from chatd.hub.session.replies import tell_error
from chatd.hub.session.session import Session, speaks_ours
from chatd.store.read.snapshots import Snapshot


class TrivialSession(Session):
    __slots__ = ("_prepared",)

    def __init__(self, services: Services, line: Line, handshake: Handshake, address: str) -> None:
        super().__init__(services, line, handshake, address)
        # What came of the URL. A refusal is told after the handshake: browsers do not see one of HTTP.
        self._prepared: tuple[Subscription, Snapshot] | ChatError | None = None

    async def prepare(self, deadline: float) -> None:
        assert self._handshake is not None
        if not self._config.hub.allow_query_token or not speaks_ours(self._handshake):
            return
        try:
            with trio.fail_at(deadline):
                self._prepared = await self._enter(self._handshake.query)
        except trio.TooSlowError:
            self._prepared = Unavailable("the login took too long")
        except ChatError as error:
            self._prepared = error

    async def _enter(self, query: dict[str, str]) -> tuple[Subscription, Snapshot]:
        conversation_id = _id_from_text(query.get("conversation_id", ""))
        token = query["token"]
        identity = await self._login.verify(token)
        await self._login.become(identity)  # first: whoever is banned from here on is found among the connected
        await self._login.become(await self._chat.logins.checked(token, identity))
        return await self._rooms.prepare(conversation_id)

    async def _greet(self, handshake: Handshake) -> None:
        prepared, self._prepared = self._prepared, None
        if prepared is None:
            self._line.close_for_good(Final.TOKEN_IN_URL)
        elif isinstance(prepared, tuple):
            self._rooms.begin(*prepared)
        elif isinstance(prepared, LOGIN_ERRORS):
            self._login.refuse(prepared, None, first=True)
        else:
            tell_error(self._line, prepared)
            match prepared:
                case BadRequest():
                    self._line.close_for_good(Final.NO_CONVERSATION)
                case NotFound():
                    self._line.close_for_good(Final.NOT_LET_IN)
                case _:
                    self._line.close_soon(Close.SERVER_ERROR, str(prepared))


def _id_from_text(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) <= 16 and 1 <= int(text) <= MAX_ID):
        raise BadRequest("conversation_id is no id", field="conversation_id")
    return int(text)
