"""The trivial client: its URL has the token and the conversation. It receives messages only.

    /ws?token=…&conversation_id=1

The answer to its handshake is all that tells it that it is in the room, so it must receive each message that is
committed after that. That is why the server logs it in and enters its room before it answers the handshake.
"""

from __future__ import annotations

import trio

from chatd.core.errors import BadRequest, ChatError, Close, Final, NotFound, Unavailable
from chatd.core.limits import MAX_ID
from chatd.hub.admission.registry import Handshake
from chatd.hub.fanout.subscription import Subscription
from chatd.hub.services import Line, Services
from chatd.hub.session.refusals import LOGIN_ERRORS
from chatd.hub.session.replies import tell_error
from chatd.hub.session.session import Session, speaks_ours
from chatd.store.read.snapshots import Snapshot


class TrivialSession(Session):
    __slots__ = ("_prepared",)

    def __init__(self, services: Services, line: Line, handshake: Handshake, address: str) -> None:
        super().__init__(services, line, handshake, address)
        # The result of the URL's login. A refusal is sent after the handshake, as a close frame, because a
        # browser does not show a page the HTTP status of a refused handshake.
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
        await self._login.become(identity)  # registered before the check, so that a ban from now on finds it
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
        raise BadRequest("conversation_id is not a valid id", field="conversation_id")
    return int(text)
