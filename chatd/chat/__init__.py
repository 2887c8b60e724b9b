"""The use cases: what the API and the hub both call, a module per noun.

logins         who is it, and does that still count
conversations  enter one, the inbox
messages       post, send, edit, delete, history
members        add, remove
"""

from __future__ import annotations

from chatd.auth.tokens import Tokens
from chatd.chat.conversations import Conversations
from chatd.chat.logins import Logins
from chatd.chat.members import Members
from chatd.chat.messages import Messages
from chatd.config import Config
from chatd.store.database import Store
from chatd.store.writer import Writer


class Chat:
    """All use cases on one store."""

    def __init__(self, config: Config, store: Store, writer: Writer) -> None:
        self.tokens = Tokens(config.auth.secret or store.token_secret, config.auth.previous_secret)
        self.logins = Logins(self.tokens, store.read)
        self.conversations = Conversations(store.read, store.epoch, config.rooms, config.limits)
        self.messages = Messages(writer, store.read, config.limits)
        self.members = Members(writer)
