"""Builds all use cases for one store."""

from __future__ import annotations

from collections.abc import Callable

from chatd.auth.keyserver import KeyServer
from chatd.auth.tokens import Tokens
from chatd.backend.auth_callback import AuthCallback
from chatd.backend.before_message import BeforeMessage
from chatd.backend.fetch import Fetcher
from chatd.chat.conversations import Conversations
from chatd.chat.events import Events
from chatd.chat.logins import Logins
from chatd.chat.members import Members
from chatd.chat.messages import Messages
from chatd.chat.presence import Presence
from chatd.chat.receipts import Receipts
from chatd.chat.typing import Typing
from chatd.chat.users import Users
from chatd.config import Config
from chatd.config.settings import Settings
from chatd.core.model import Signal
from chatd.store.database import Store
from chatd.store.write.writer import Writer


class Chat:
    """All use cases for one store. `tell` sends a signal to all nodes, `fetch` calls the backend."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        writer: Writer,
        presence: Presence,
        tell: Callable[[Signal], None],
        fetch: Fetcher,
    ) -> None:
        config = settings.now
        self._secret, self._fetch = store.token_secret, fetch
        self.tokens = self.tokens_of(config)
        backend = AuthCallback(settings, fetch) if config.auth.backend_url else None
        self.logins = Logins(backend or self.tokens, store.read, settings)
        self.conversations = Conversations(store.read, settings, presence)
        self.messages = Messages(writer, store.read, settings)
        self.members = Members(writer)
        self.receipts = Receipts(writer, store.read, presence, settings)
        self.users = Users(writer, store.read, presence, tell)
        self.presence = presence
        self.typing = Typing(tell)
        self.events = Events(tell)
        hooks = config.webhooks
        asked = bool(hooks.before_message_url)
        self.before_message = BeforeMessage(hooks, fetch, self.messages.check) if asked else None

    def tokens_of(self, config: Config) -> Tokens:
        """Tokens for this configuration. Raises ConfigError if a key file holds no valid key."""
        auth = config.auth
        server = KeyServer(self._fetch, auth.jwks_url) if auth.jwks_url else None
        return Tokens(self._secret, auth, server, frame_bytes=config.limits.frame_bytes)

    def use_tokens(self, tokens: Tokens) -> None:
        """Use other tokens from now on. Users who are logged in stay logged in."""
        if self.logins.authenticator is self.tokens:
            self.logins.authenticator = tokens
        self.tokens = tokens
