"""Every option, its type, its default and its bounds; `chatd.toml` describes each."""

from __future__ import annotations

from typing import Annotated, Literal, get_args

import msgspec
from msgspec import Meta, Struct, field

Seconds = Annotated[float, Meta(gt=0, le=3600)]
MOST = 2**53 - 1  # what the databases and JavaScript can hold
Count = Annotated[int, Meta(ge=0, le=MOST)]
Positive = Annotated[int, Meta(ge=1, le=MOST)]


class Server(Struct, frozen=True, forbid_unknown_fields=True):
    drain_window: Annotated[float, Meta(ge=0, le=300)] = 5.0
    workers: Annotated[int, Meta(ge=1, le=64)] = 1
    private_networks: list[str] = field(default_factory=lambda: ["127.0.0.0/8", "::1/128"])


class Api(Struct, frozen=True, forbid_unknown_fields=True):
    bind: str = "127.0.0.1:8080"
    internal_token: str = ""
    previous_internal_token: str = ""


class Hub(Struct, frozen=True, forbid_unknown_fields=True):
    bind: str = "127.0.0.1:6001"
    allow_query_token: bool = False
    origins: list[str] = []
    handshake_timeout: Seconds = 5.0
    auth_timeout: Seconds = 10.0
    ping_interval: Seconds = 25.0
    ping_timeout: Seconds = 10.0


class Database(Struct, frozen=True, forbid_unknown_fields=True):
    url: str = "sqlite:///chatd.db"
    readers: Annotated[int, Meta(ge=1, le=64)] = 4


class Redis(Struct, frozen=True, forbid_unknown_fields=True):
    url: str = ""
    ingest: bool = True
    accept_foreign: bool = False
    stream_length: Positive = 100_000
    stream_bytes: Positive = 64 * 1024 * 1024


Algorithm = Literal["HS256", "RS256", "ES256", "EdDSA"]


class Auth(Struct, frozen=True, forbid_unknown_fields=True):
    secret: str = ""
    previous_secret: str = ""
    algorithms: list[Algorithm] = field(default_factory=lambda: ["HS256"])
    key_files: list[str] = []
    jwks_url: str = ""
    audience: str = ""
    issuer: str = ""
    leeway: Annotated[float, Meta(ge=0, le=30)] = 5.0
    expiry_grace: Annotated[float, Meta(ge=0, le=300)] = 2.0
    token_ttl: Positive = 3600
    backend_url: str = ""
    backend_timeout: Seconds = 3.0
    backend_cache: Annotated[float, Meta(ge=0, le=3600)] = 10.0


ANY_TYPE = "*"  # in rooms.client_types
TypeName = Annotated[str, Meta(min_length=1, max_length=32)]


class Rooms(Struct, frozen=True, forbid_unknown_fields=True):
    access: Literal["members", "open"] = "members"
    client_types: list[TypeName] = field(default_factory=lambda: ["text", "image", "video", "audio", "file"])


class Limits(Struct, frozen=True, forbid_unknown_fields=True):
    connections: Count = 0
    connections_per_user: Count = 20
    connections_per_address: Count = 0
    handshakes_per_second: Count = 500
    failed_logins_per_minute: Count = 10
    rooms_per_connection: Positive = 200
    sends_per_second: Count = 10
    frame_bytes: Annotated[int, Meta(ge=1024, le=1024 * 1024)] = 65536
    content_chars: Annotated[int, Meta(ge=1, le=262_144)] = 8000
    meta_bytes: Annotated[int, Meta(ge=0, le=262_144)] = 8192
    members_detail: Count = 100
    trusted_proxies: list[str] = []


Unasked = Literal["message.created", "user.online", "user.offline", "room.occupied", "room.vacated"]
Asked = Literal["message.updated", "message.deleted", "message.reacted", "member.added", "member.removed"]


class Webhooks(Struct, frozen=True, forbid_unknown_fields=True):
    url: str = ""
    secret: str = ""
    events: list[Unasked | Asked] = field(default_factory=lambda: list(get_args(Unasked)))
    timeout: Seconds = 5.0
    attempts: Annotated[int, Meta(ge=1, le=100)] = 15
    kept: Positive = 100_000
    before_message_url: str = ""
    before_message_timeout: Seconds = 1.0
    before_message_failure: Literal["refuse", "accept"] = "refuse"


class Retention(Struct, frozen=True, forbid_unknown_fields=True):
    days: Annotated[float, Meta(ge=0, le=36_500)] = 0.0
    messages: Count = 0


class Logs(Struct, frozen=True, forbid_unknown_fields=True):
    level: Literal["debug", "info", "warning", "error"] = "info"
    format: Literal["auto", "json", "text"] = "auto"


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
