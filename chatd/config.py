"""The configuration: `chatd.toml`, credentials and the environment, decoded into frozen structs.

Every option is described in `chatd.toml`. All mistakes are reported at once, each with its key.
"""

from __future__ import annotations

import ipaddress
import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta, Struct, field

from chatd.errors import ConfigError
from chatd.validation import mistakes, suggestion

Seconds = Annotated[float, Meta(gt=0, le=3600)]
Count = Annotated[int, Meta(ge=0)]
Positive = Annotated[int, Meta(ge=1)]

DEMO_TOKEN = "secret"

# The names of the original deployment, still understood: (variable, section, key).
_ORIGINAL_NAMES = {"WS_INTERNAL_TOKEN": ("api", "internal_token")}
_PREFIX = "CHATD_"
CREDENTIALS = "CREDENTIALS_DIRECTORY"  # systemd.exec(5)

_WRITE_URL = "write https://host/path, or http:// for an address in server.private_networks."
_NO_TOKEN = (
    "api.internal_token: is empty, so no backend could post. Set it here or in CHATD_API__INTERNAL_TOKEN"
    " to a long random string (openssl rand -hex 32), or try `chatd serve --demo`."
)


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


Algorithm = Literal["HS256", "RS256", "ES256", "EdDSA"]


class Auth(Struct, frozen=True, forbid_unknown_fields=True):
    secret: str = ""
    previous_secret: str = ""
    algorithms: list[Algorithm] = field(default_factory=lambda: ["HS256"])
    key_files: list[str] = []
    jwks_url: str = ""
    audience: str = ""
    issuer: str = ""
    leeway: Annotated[float, Meta(ge=0, le=30)] = 0.0
    expiry_grace: Annotated[float, Meta(ge=0, le=300)] = 2.0
    token_ttl: Positive = 3600
    backend_url: str = ""
    backend_timeout: Seconds = 3.0
    backend_cache: Annotated[float, Meta(ge=0, le=3600)] = 10.0


class Rooms(Struct, frozen=True, forbid_unknown_fields=True):
    access: Literal["members", "open"] = "members"


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


WebhookEvent = Literal["message.created", "user.online", "user.offline", "room.occupied", "room.vacated"]


class Webhooks(Struct, frozen=True, forbid_unknown_fields=True):
    url: str = ""
    secret: str = ""
    events: list[WebhookEvent] = field(default_factory=lambda: list(get_args(WebhookEvent)))
    timeout: Seconds = 5.0
    attempts: Annotated[int, Meta(ge=1, le=100)] = 15
    kept: Positive = 100_000
    before_message_url: str = ""
    before_message_timeout: Seconds = 1.0
    before_message_failure: Literal["refuse", "accept"] = "refuse"


class Retention(Struct, frozen=True, forbid_unknown_fields=True):
    days: Annotated[float, Meta(ge=0)] = 0.0
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

Data = dict[str, dict[str, Any]]
Origins = dict[tuple[str, str], str]  # what gave a value that is none of ours, by section and key

_DEMO: Data = {
    "database": {"url": "sqlite:///chatd-demo.db"},  # not in the way of a real one in the same directory
    "api": {"internal_token": DEMO_TOKEN},
    "hub": {"allow_query_token": True},
    "rooms": {"access": "open"},
}


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    demo: bool = False,
    require_token: bool = True,
    origins: Origins | None = None,
) -> Config:
    """The configuration of this process, or ConfigError with every mistake in it.

    Later wins: defaults, the file, what makes a demo, credentials (`$CREDENTIALS_DIRECTORY/<section>.<key>`),
    the environment (`CHATD_SECTION__KEY`, `CHATD_SECTION__KEY_FILE`). Commands that serve no backend do not
    require a token. `origins` is filled: with the path of a file, or the name of a variable.
    """
    environ = os.environ if environ is None else environ
    found: list[str] = []
    data: Data = {}
    origins = {} if origins is None else origins
    for source in (
        _file(path, found, origins),
        _fixed(demo, origins),
        _credentials(environ, found, origins),
        _environment(environ, found, origins),
    ):
        for section, values in source.items():
            data.setdefault(section, {}).update(values)
    sections = {name: _section(name, kind, data.pop(name, {}), found) for name, kind in SECTIONS.items()}
    found += [f"[{name}]: there is no such section{suggestion(name, SECTIONS)}." for name in data]
    # A section that could not be read is judged no further; the others are.
    readable = {name: section for name, section in sections.items() if section is not None}
    config = Config(**readable, demo=demo)  # type: ignore[arg-type]
    further = list(_contradictions(config))
    if require_token and not config.api.internal_token:
        further.append(_NO_TOKEN)
    found += [mistake for mistake in further if mistake.partition(".")[0] in readable]
    if found:
        raise ConfigError(*found)
    return config


def split_bind(bind: str) -> tuple[str, int]:
    """`"127.0.0.1:8080"` → `("127.0.0.1", 8080)`; `"[::1]:8080"` and `":8080"` (every address) work too."""
    host, colon, port = bind.rpartition(":")
    if not colon or not port.isascii() or not port.isdecimal() or not 0 <= int(port) <= 65535:
        raise ValueError(bind)
    return host.strip("[]"), int(port)


def _file(path: Path | None, found: list[str], origins: Origins) -> Data:
    if path is None:
        return {}
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        found.append(f"{path}: {error.strerror}.")
        return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        found.append(f"{path}: this is not TOML: {error}.")
        return {}
    loose = [key for key, value in data.items() if not isinstance(value, dict)]
    found += [f"{key}: stands outside a section; put it under one, [api] say." for key in loose]
    sections = {key: value for key, value in data.items() if key not in loose}
    _note(origins, sections, str(path))
    return sections


def _fixed(demo: bool, origins: Origins) -> Data:
    data = _DEMO if demo else {}
    _note(origins, data, "--demo")
    return data


def _note(origins: Origins, data: Data, name: str) -> None:
    origins.update({(section, key): name for section, values in data.items() for key in values})


def _credentials(environ: Mapping[str, str], found: list[str], origins: Origins) -> Data:
    directory = environ.get(CREDENTIALS)
    data: Data = {}
    for path in sorted(Path(directory).glob("*.*")) if directory else []:
        section, _, key = path.name.partition(".")
        # Units may carry credentials for other programs; what is none of ours is left alone.
        if section in SECTIONS and key in SECTIONS[section].__struct_fields__:
            data.setdefault(section, {})[key] = _secret(path, str(path), found)
            origins[section, key] = str(path)
    return data


def _environment(environ: Mapping[str, str], found: list[str], origins: Origins) -> Data:
    data: Data = {}
    for name, (section, key) in _ORIGINAL_NAMES.items():
        if environ.get(name):
            data.setdefault(section, {})[key] = environ[name]
            origins[section, key] = name
    if environ.get("REDIS_HOST"):
        url = f"redis://{environ['REDIS_HOST']}:{environ.get('REDIS_PORT') or 6379}/0"
        data.setdefault("redis", {})["url"] = url
        origins["redis", "url"] = "REDIS_HOST"
    found += [f"{name}: write {better}, with two underscores." for name, better in _misspelt(environ)]
    for name, section, key in _our_variables(environ):
        if section not in SECTIONS:
            found.append(f"{name}: there is no section {section}{suggestion(section, SECTIONS)}.")
        elif key.endswith("_file") and key not in SECTIONS[section].__struct_fields__:
            key = key.removesuffix("_file")
            data.setdefault(section, {})[key] = _secret(Path(environ[name]), name, found)
        else:
            data.setdefault(section, {})[key] = _from_text(section, key, environ[name])
        origins[section, key] = name
    return data


def _our_variables(environ: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    # Sorted, so that CHATD_X__Y_FILE wins over CHATD_X__Y on every machine alike.
    for name in sorted(environ):
        section, separator, key = name.removeprefix(_PREFIX).lower().partition("__")
        if name.startswith(_PREFIX) and separator:
            yield name, section, key


def _misspelt(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables that name an option with one underscore, CHATD_HUB_BIND say: nobody would ever read them."""
    for section, kind in SECTIONS.items():
        for key in kind.__struct_fields__:
            name = f"{_PREFIX}{section}_{key}".upper()
            if name in environ:
                yield name, f"{_PREFIX}{section}__{key}".upper()


def _secret(path: Path, origin: str, found: list[str]) -> str:
    try:
        return path.read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        found.append(f"{origin}: cannot read {path}: {error}.")
        return ""


def _from_text(section: str, key: str, text: str) -> Any:
    field = next((f for f in msgspec.structs.fields(SECTIONS[section]) if f.name == key), None)
    if field is not None and get_origin(field.type) is list:
        return [part.strip() for part in text.split(",") if part.strip()]
    if field is not None and field.type is not str:
        try:
            return msgspec.convert(text, field.type, strict=False)
        except msgspec.ValidationError:
            pass  # the section's own check says it with the key
    return text


def _section(name: str, kind: type[Struct], values: dict[str, Any], found: list[str]) -> Struct | None:
    wrong = mistakes(kind, values)
    found += [f"{name}.{key}: {sentence}" for key, sentences in wrong.items() for sentence in sentences]
    return None if wrong else msgspec.convert(values, kind)


def _contradictions(config: Config) -> Iterator[str]:
    """What is wrong with values that are well formed."""
    for key, bind in (("api.bind", config.api.bind), ("hub.bind", config.hub.bind)):
        try:
            host, _ = split_bind(bind)
        except ValueError:
            yield f"{key}: {bind!r} is no address; write host:port, as in 127.0.0.1:8080 (65535 at most)."
            continue
        if config.demo and not is_loopback(host):
            yield f"{key}: the demo has a known token, so it listens on this machine alone; use 127.0.0.1."
    yield from _wrong_auth(config.auth)
    yield from _wrong_webhooks(config.webhooks)
    for network in config.server.private_networks:
        if not _is_network(network):
            yield f"server.private_networks: {network!r} is neither an address nor a network."
    for key, secret in (("secret", config.auth.secret), ("previous_secret", config.auth.previous_secret)):
        if secret and len(secret) < 32:
            yield f"auth.{key}: has {len(secret)} characters; use at least 32 (openssl rand -hex 32)."
    if _scheme(config.database.url) not in ("sqlite", "postgresql"):
        yield "database.url: write sqlite:///path/to/chatd.db or postgresql://user:password@host/database."
    elif config.database.url in ("sqlite://", "sqlite:///", "sqlite:///:memory:"):
        yield "database.url: a database in memory would lose every message; name a file, sqlite:///chatd.db."
    if config.redis.url and _scheme(config.redis.url) not in ("redis", "rediss", "unix"):
        yield "redis.url: write redis://host:6379/0, rediss://… for TLS, or unix:///path/to/redis.sock."
    if config.server.workers > 1 and not config.redis.url:
        yield "server.workers: more than one need redis.url, for they tell each other of messages through it."
    if config.redis.accept_foreign and not config.redis.url:
        yield "redis.accept_foreign: needs redis.url."
    for origin in config.hub.origins:
        if not _is_origin(origin):
            yield f"hub.origins: {origin!r} is no origin; write https://chat.example.com, without a path."
    for network in config.limits.trusted_proxies:
        if not _is_network(network):
            yield f"limits.trusted_proxies: {network!r} is neither an address nor a network."


def _wrong_auth(auth: Auth) -> Iterator[str]:
    for key, url in (("backend_url", auth.backend_url), ("jwks_url", auth.jwks_url)):
        if not _may_be_called(url):
            yield f"auth.{key}: {_WRITE_URL}"
    public = [name for name in auth.algorithms if name != "HS256"]
    if not auth.algorithms:
        yield 'auth.algorithms: names none, so no token would be valid; write ["HS256"].'
    if public and not (auth.key_files or auth.jwks_url):
        yield f"auth.algorithms: {public[0]} needs a public key; set auth.key_files or auth.jwks_url."
    if (auth.key_files or auth.jwks_url) and not public:
        yield "auth.algorithms: add RS256, ES256 or EdDSA, for HS256 alone uses no key file and no key server."


def _wrong_webhooks(webhooks: Webhooks) -> Iterator[str]:
    for key, url in (("url", webhooks.url), ("before_message_url", webhooks.before_message_url)):
        if not _may_be_called(url):
            yield f"webhooks.{key}: {_WRITE_URL}"
    if (webhooks.url or webhooks.before_message_url) and len(webhooks.secret) < 32:
        yield (
            "webhooks.secret: your backend knows by it that a call is ours; set it to at least 32 characters"
            " (openssl rand -hex 32)."
        )


def _may_be_called(url: str) -> bool:
    return not url or (_scheme(url) in ("http", "https") and bool(urlsplit(url).hostname))


def _is_network(text: str) -> bool:
    try:
        ipaddress.ip_network(text)
    except ValueError:
        return False
    return True


def _scheme(url: str) -> str:
    """Of a URL that can be read to its port; empty for any other."""
    try:
        parts = urlsplit(url)
        return parts.scheme if parts.port is None or parts.port else ""
    except ValueError:
        return ""


def _is_origin(text: str) -> bool:
    return _scheme(text) in ("http", "https") and bool(urlsplit(text).netloc) and not urlsplit(text).path


def is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
