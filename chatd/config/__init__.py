"""The configuration: `chatd.toml`, credentials and the environment, decoded into frozen structs.

chatd reports all mistakes at once, each with its key.

options   every option: type, default, bounds, description
sources   reads the values
rules     checks what a type cannot express
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from chatd.config.options import (
    ANY_TYPE,
    SECTIONS,
    Api,
    Auth,
    Config,
    Database,
    Hub,
    Limits,
    Logs,
    Redis,
    Retention,
    Rooms,
    Server,
    Webhooks,
)
from chatd.config.origins import AllowedOrigins
from chatd.config.rules import contradictions, is_loopback, is_loopback_name, split_bind
from chatd.config.sources import (
    CREDENTIALS,
    DEMO_TOKEN,
    ORIGINAL_NAMES,
    Data,
    Origins,
    for_a_demo,
    from_credentials,
    from_environment,
    from_file,
)
from chatd.core.errors import ConfigError
from chatd.core.validation import mistakes, suggestion

__all__ = [
    "ANY_TYPE",
    "CREDENTIALS",
    "DEMO_TOKEN",
    "ORIGINAL_NAMES",
    "SECTIONS",
    "AllowedOrigins",
    "Api",
    "Auth",
    "Config",
    "Database",
    "Hub",
    "Limits",
    "Logs",
    "Origins",
    "Redis",
    "Retention",
    "Rooms",
    "Server",
    "Webhooks",
    "is_loopback",
    "is_loopback_name",
    "load",
    "split_bind",
]

_NO_TOKEN = (
    "api.internal_token: is empty, so no backend could use the API. Set it here or in CHATD_API__INTERNAL_TOKEN"
    " to a long random string (openssl rand -hex 32), or try `chatd serve --demo`."
)


def load(
    path: Path | None = None,
    environ: Mapping[str, str] | None = None,
    *,
    demo: bool = False,
    require_token: bool = True,
    origins: Origins | None = None,
) -> Config:
    """Read the configuration of this process. Raises ConfigError with every mistake in it.

    Later sources override earlier ones: the defaults, the file at `path`, the values of the demo, credentials
    (`$CREDENTIALS_DIRECTORY/<section>.<key>`), the environment (`CHATD_SECTION__KEY`,
    `CHATD_SECTION__KEY_FILE`). Commands that serve no API pass `require_token=False`. `load` fills `origins`
    with the source of each value: the path of a file or the name of a variable.
    """
    environ = os.environ if environ is None else environ
    found: list[str] = []
    data: Data = {}
    origins = {} if origins is None else origins
    for source in (
        from_file(path, found, origins),
        for_a_demo(demo, origins),
        from_credentials(environ, found, origins),
        from_environment(environ, found, origins),
    ):
        for section, values in source.items():
            data.setdefault(section, {}).update(values)
    sections = {name: _section(name, kind, data.pop(name, {}), found) for name, kind in SECTIONS.items()}
    found += [f"[{name}]: there is no such section{suggestion(name, SECTIONS)}." for name in data]
    # `rules` sees the defaults in place of a section that is not valid, so its mistakes there mean nothing.
    readable = {name: section for name, section in sections.items() if section is not None}
    config = Config(**readable, demo=demo)  # type: ignore[arg-type]
    further = list(contradictions(config))
    if require_token and not config.api.internal_token:
        further.append(_NO_TOKEN)
    found += [mistake for mistake in further if mistake.partition(".")[0] in readable]
    if found:
        raise ConfigError(*found)
    return config


def _section(name: str, kind: type[Struct], values: dict[str, Any], found: list[str]) -> Struct | None:
    wrong = mistakes(kind, values)
    found += [f"{name}.{key}: {sentence}" for key, sentences in wrong.items() for sentence in sentences]
    return None if wrong else msgspec.convert(values, kind)
