"""Every option: its type, default, bounds and description.

`make reference` generates `chatd.toml` and docs/configuration.md from this module. Describe options only here.
"""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct, field

Seconds = Annotated[float, Meta(gt=0, le=3600)]
MOST = 2**53 - 1  # the largest integer that the databases and JavaScript hold exactly
Count = Annotated[int, Meta(ge=0, le=MOST)]
Positive = Annotated[int, Meta(ge=1, le=MOST)]


class Server(Struct, frozen=True, forbid_unknown_fields=True):
    """The process itself."""

    drain_window: Annotated[float, Meta(ge=0, le=300)] = 5.0
    """Seconds over which a stopping chatd moves its clients: it asks them to reconnect in the first half and
    closes the rest in the second.
    """
    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    """Number of processes. Raise it when one process keeps a core busy. More than one need Redis."""
    private_networks: list[str] = field(default_factory=lambda: ["127.0.0.0/8", "::1/128"])
    """Networks that chatd may call (`auth.backend_url`, `auth.jwks_url`, webhooks) although they are
    private. To them it may also speak plain HTTP.
    """


class Api(Struct, frozen=True, forbid_unknown_fields=True):
    """HTTP for your backend. Keep this port off the internet."""

    bind: str = "127.0.0.1:8080"
    """Where the API listens: `host:port`."""
    internal_token: str = ""
    """Required. Your backend sends it as `X-Internal-Token`; make one with `openssl rand -hex 32`."""
    previous_internal_token: str = ""
    """A second token that is accepted as well, while you replace the first."""


class Hub(Struct, frozen=True, forbid_unknown_fields=True):
    """WebSocket for your users."""

    bind: str = "127.0.0.1:6001"
    """Where the WebSockets listen: `host:port`, or `:6001` for every address. Put a TLS proxy in front."""
    allow_query_token: bool = False
    """Accept `/ws?token=…&conversation_id=1`. Tokens in URLs reach access logs."""
    origins: list[str] = []
    """Browser origins that may connect: `https://app.example.com`, `https://*.example.org`,
    `capacitor://localhost`. If the list is empty, only pages from the host name of the WebSocket URL may
    connect. A list replaces that rule, so name the origin of your own pages, too.
    """
    handshake_timeout: Seconds = 5.0
    """Seconds that a client has for the HTTP upgrade."""
    auth_timeout: Seconds = 10.0
    """Seconds that a connection has to authenticate."""
    ping_interval: Seconds = 25.0
    """Seconds without a frame from a client after which chatd sends it a ping."""
    ping_timeout: Seconds = 10.0
    """Seconds that the client has to answer the ping. After that, chatd closes the connection."""


class Database(Struct, frozen=True, forbid_unknown_fields=True):
    """Where messages are stored."""

    url: str = "sqlite:///chatd.db"
    """`sqlite:///chatd.db` (relative to the working directory) or
    `postgresql://user:password@host/database`. PostgreSQL with standbys: `@host1:5432,host2:5432/`.
    """
    readers: Annotated[int, Meta(ge=1, le=64)] = 4
    """Number of connections that chatd reads with."""


RedisName = Annotated[str, Meta(min_length=1, max_length=200)]


def _with_prefixes(name: str) -> list[str]:
    """The name, and what an older and a newer Laravel make of it where APP_NAME was never changed."""
    return [name, f"laravel_database_{name}", f"laravel-database-{name}"]


class Redis(Struct, frozen=True, forbid_unknown_fields=True):
    """Needed for several nodes or workers, and for other services that read chatd's events."""

    url: str = ""
    """`redis://127.0.0.1:6379/0`, `rediss://…` for TLS, or `unix:///run/redis.sock`; docs/configuration.md
    lists its options. If it is empty, this process serves all clients by itself.
    """
    ingest: bool = True
    """Store the messages that others add to the streams of `ingest_streams`. A program that may XADD there may
    post.
    """
    ingest_streams: list[RedisName] = field(default_factory=lambda: _with_prefixes("chat.ingest"))
    """Streams from which chatd takes messages: names, or patterns with `*`, `?` or `[…]`."""
    accept_foreign: bool = True
    """Deliver what others PUBLISH on the channels of `foreign_channels`. chatd does not store it."""
    foreign_channels: list[RedisName] = field(default_factory=lambda: _with_prefixes("chat.messages"))
    """Channels of other services: names, or patterns with `*`, `?` or `[…]`."""
    stream_length: Positive = 100_000
    """Approximate number of entries that `chat.stream` keeps."""
    stream_bytes: Positive = 64 * 1024 * 1024
    """Approximate number of bytes that `chat.stream` keeps. Whichever of the two limits is
    reached first counts.
    """


Algorithm = Literal["HS256", "HS384", "HS512", "RS256", "ES256", "EdDSA"]


class Auth(Struct, frozen=True, forbid_unknown_fields=True):
    """The tokens of your users: JWTs, or whatever your backend understands."""

    secret: str = ""
    """The secret that signs tokens; at least 32 characters, 48 for HS384, 64 for HS512. If your backend signs
    the tokens, both use the same secret. If it is empty, chatd makes one and keeps it in the database.
    """
    previous_secret: str = ""
    """A second secret that is accepted as well, while you replace the first."""
    algorithms: list[Algorithm] = field(default_factory=lambda: ["HS256"])
    """Algorithms that a token may use. HS256, HS384 and HS512 use the secrets; RS256, ES256 and EdDSA use
    public keys. chatd issues tokens with the first in the list that uses a secret.
    """
    key_files: list[str] = []
    """PEM files with public keys."""
    jwks_url: str = ""
    """A key server: `https://login.example.com/.well-known/jwks.json`."""
    audience: str = ""
    """The audience that a token must name in `aud`, if you set one."""
    issuer: str = ""
    """The issuer that a token must name in `iss`, if you set one."""
    leeway: Annotated[float, Meta(ge=0, le=30)] = 5.0
    """Seconds by which the clock of the token's issuer and that of chatd may differ."""
    expiry_grace: Annotated[float, Meta(ge=0, le=300)] = 2.0
    """Seconds that a connected client has to bring a new token after its own has expired."""
    token_ttl: Positive = 3600
    """Seconds that a token from `POST /api/ws/tokens` is valid, unless the request says otherwise."""
    backend_url: str = ""
    """chatd asks your backend at this address to which user a token belongs. It POSTs `{"token"}` with
    `X-Internal-Token`, and your backend answers `{"user_id", "expires_in"}`.
    """
    backend_timeout: Seconds = 3.0
    """Seconds that your backend has to answer."""
    backend_cache: Annotated[float, Meta(ge=0, le=3600)] = 10.0
    """Seconds for which chatd remembers that your backend accepted a token. 0: chatd asks each time."""


ANY_TYPE = "*"  # an entry of rooms.client_types
TypeName = Annotated[str, Meta(min_length=1, max_length=32)]


class Rooms(Struct, frozen=True, forbid_unknown_fields=True):
    """Who may enter a room, and what clients may send there."""

    access: Literal["members", "open"] = "members"
    """Who may enter a conversation. `members`: its members, and users whose token lists it. `open`: every user
    with a valid token.
    """
    client_types: list[TypeName] = field(default_factory=lambda: ["text", "image", "video", "audio", "file"])
    """Message types that clients may send. `*` allows every type. Backends may always send every type."""


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    """Limits. 0 means no limit. With several workers, each gets an equal share of `connections` and
    `handshakes_per_second`. Each worker counts the connections and sends of a user, and the connections of an
    address, separately.
    """

    connections: Count = 0
    """All WebSocket connections. chatd answers further handshakes with 503."""
    connections_per_user: Count = 20
    """Connections of one user. chatd closes further ones for good (`too_many_connections`)."""
    connections_per_address: Count = 0
    """Connections from one address. chatd answers further handshakes with 503."""
    handshakes_per_second: Count = 500
    """Handshakes per second. chatd answers further ones with 503 and `Retry-After`. One address alone can use
    half of them.
    """
    failed_logins_per_minute: Count = 10
    """Failed logins per minute from one address. chatd closes further failed ones with 4006. Loopback addresses
    and trusted proxies have no such limit.
    """
    rooms_per_connection: Positive = 200
    """Rooms that one connection may subscribe to."""
    sends_per_second: Count = 10
    """Messages, edits, deletes and reactions of one user per second. A burst may have twice as many."""
    frame_bytes: Annotated[int, Meta(ge=1024, le=1024 * 1024)] = 65536
    """Bytes of a WebSocket frame from a client. chatd closes a connection that sends a larger one with 1009."""
    content_chars: Annotated[int, Meta(ge=1, le=262_144)] = 8000
    """Characters of a message."""
    meta_bytes: Annotated[int, Meta(ge=0, le=262_144)] = 8192
    """Bytes of a message's `meta`, as JSON."""
    members_detail: Count = 100
    """Largest conversation, in members, that shows the receipts of others and who is online."""
    trusted_proxies: list[str] = []
    """Addresses or networks of proxies whose `X-Forwarded-For` chatd trusts: `127.0.0.1`."""


Unasked = Literal["message.created", "user.online", "user.offline", "room.occupied", "room.vacated"]
Asked = Literal["message.updated", "message.deleted", "message.reacted", "member.added", "member.removed"]


class Webhooks(Struct, frozen=True, forbid_unknown_fields=True):
    """What chatd reports to your backend."""

    url: str = ""
    """Where chatd POSTs events. If it is empty, chatd reports nothing."""
    secret: str = ""
    """The secret that signs chatd's requests; at least 32 characters. If it starts with `whsec_`, the rest is
    the key in base64, as Standard Webhooks specifies; any other secret is the key as it is.
    """
    events: list[Unasked | Asked] = field(default_factory=lambda: list(get_args(Unasked)))
    """Events that chatd reports. You can add `message.updated`, `message.deleted`, `message.reacted`,
    `member.added` and `member.removed`.
    """
    timeout: Seconds = 5.0
    """Seconds that your backend has to answer one request."""
    attempts: Annotated[int, Meta(ge=1, le=100)] = 15
    """Attempts after which chatd gives an event up. 15 take about three hours, 21 about nine hours."""
    kept: Positive = 100_000
    """Number of waiting events from which on chatd adds no more events about presence."""
    before_message_url: str = ""
    """chatd asks your backend at this address before it stores a message or an edit from a client. Your backend
    may refuse or change it.
    """
    before_message_timeout: Seconds = 1.0
    """Seconds that your backend has to answer."""
    before_message_failure: Literal["refuse", "accept"] = "refuse"
    """What chatd does with a message if your backend gives no answer: `refuse` (the client gets `unavailable`)
    or `accept`.
    """


class Retention(Struct, frozen=True, forbid_unknown_fields=True):
    """Old messages that chatd removes, once an hour. A client that comes back
    with an older cursor starts over.
    """

    days: Annotated[float, Meta(ge=0, le=36_500)] = 0.0
    """Remove messages that are older than this number of days. 0: keep messages of any age."""
    messages: Count = 0
    """Keep only this number of newest messages in each conversation. 0: keep all."""


class Logs(Struct, frozen=True, forbid_unknown_fields=True):
    """The log, on standard error."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The lowest level that chatd logs."""
    format: Literal["auto", "json", "text"] = "auto"
    """`json`, `text`, or `auto`: text on a terminal, JSON elsewhere."""


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    server: Server = Server()
    api: Api = Api()
    hub: Hub = Hub()
    database: Database = Database()
    redis: Redis = Redis()
    auth: Auth = Auth()
    rooms: Rooms = Rooms()
    limits: Limits = Limits()
    webhooks: Webhooks = Webhooks()
    retention: Retention = Retention()
    logs: Logs = Logs()
    demo: bool = False


SECTIONS: dict[str, type[Struct]] = {
    field.name: field.type for field in msgspec.structs.fields(Config) if field.name != "demo"
}
