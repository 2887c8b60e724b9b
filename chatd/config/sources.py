"""Reads values from the file, the demo's presets, systemd's credentials and the environment."""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_origin

import msgspec

from chatd.config.options import SECTIONS
from chatd.core.validation import suggestion

DEMO_TOKEN = "secret"
CREDENTIALS = "CREDENTIALS_DIRECTORY"  # systemd.exec(5)

# Names that chatd's first deployment used; chatd still reads them: variable → (section, key).
_ORIGINAL_NAMES = {"WS_INTERNAL_TOKEN": ("api", "internal_token")}
_ORIGINAL_REDIS = "REDIS_HOST"
ORIGINAL_NAMES = frozenset([*_ORIGINAL_NAMES, _ORIGINAL_REDIS])
_PREFIX = "CHATD_"

Data = dict[str, dict[str, Any]]
Origins = dict[tuple[str, str], str]  # (section, key) → the source of a value that is not the default

_DEMO: Data = {
    "database": {"url": "sqlite:///chatd-demo.db"},  # never a real database in the same directory
    "api": {"internal_token": DEMO_TOKEN},
    "hub": {"allow_query_token": True},
    "rooms": {"access": "open"},
}


def from_file(path: Path | None, found: list[str], origins: Origins) -> Data:
    if path is None:
        return {}
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        found.append(f"{path}: {error.strerror}.")
        return {}
    except (ValueError, RecursionError) as error:  # Python also refuses numbers of thousands of digits
        found.append(f"{path}: is not valid TOML: {error}.")
        return {}
    loose = [key for key, value in data.items() if not isinstance(value, dict)]
    found += [f"{key}: is outside every section; put it into one, for example [api]." for key in loose]
    sections = {key: value for key, value in data.items() if key not in loose}
    _note(origins, sections, str(path))
    return sections


def for_a_demo(demo: bool, origins: Origins) -> Data:
    data = _DEMO if demo else {}
    _note(origins, data, "--demo")
    return data


def _note(origins: Origins, data: Data, name: str) -> None:
    origins.update({(section, key): name for section, values in data.items() for key in values})


def from_credentials(environ: Mapping[str, str], found: list[str], origins: Origins) -> Data:
    directory = environ.get(CREDENTIALS)
    data: Data = {}
    for path in sorted(Path(directory).glob("*.*")) if directory else []:
        section, _, key = path.name.partition(".")
        # A unit may pass credentials for other programs: ignore names that are no option.
        if section in SECTIONS and key in SECTIONS[section].__struct_fields__:
            data.setdefault(section, {})[key] = _secret(path, str(path), found)
            origins[section, key] = str(path)
    return data


def from_environment(environ: Mapping[str, str], found: list[str], origins: Origins) -> Data:
    data: Data = {}
    for name, (section, key) in _ORIGINAL_NAMES.items():
        if environ.get(name):
            data.setdefault(section, {})[key] = environ[name]
            origins[section, key] = name
    if environ.get(_ORIGINAL_REDIS):
        url = f"redis://{environ[_ORIGINAL_REDIS]}:{environ.get('REDIS_PORT') or 6379}/0"
        data.setdefault("redis", {})["url"] = url
        origins["redis", "url"] = _ORIGINAL_REDIS
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
    # Sorted, so that CHATD_X__Y_FILE overrides CHATD_X__Y whatever their order in the environment.
    for name in sorted(environ):
        section, separator, key = name.removeprefix(_PREFIX).lower().partition("__")
        if name.startswith(_PREFIX) and separator:
            yield name, section, key


def _misspelt(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Variables with one underscore, as CHATD_HUB_BIND, and the right name:
    chatd would silently ignore them.
    """
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
            pass  # `mistakes` reports it with the key
    return text
