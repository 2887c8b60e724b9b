"""chatd.toml and the reference of the configuration, from the structs and their docstrings."""

from __future__ import annotations

import ast
import inspect
import json
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from msgspec import inspect as types

from chatd.config import SECTIONS
from chatd.config.settings import RELOADABLE

WIDTH = 100  # of chatd.toml
MOST = 2**53 - 1  # the bound of what has none that is of interest

HEAD = """\
# chatd.toml: every option with its default. Remove what you do not change.
#
# An option can also come from the environment, CHATD_SECTION__KEY (CHATD_API__INTERNAL_TOKEN=…), from a file
# that the environment names, CHATD_SECTION__KEY_FILE, or from a systemd credential called section.key.
# `chatd check-config` reports every mistake at once.
"""


class Option(NamedTuple):
    section: str
    key: str
    kind: str  # for people: "integer, 1 to 64"
    default: str  # as TOML
    reloads: bool
    text: str

    @property
    def variable(self) -> str:
        return f"CHATD_{self.section}__{self.key}".upper()


def sample() -> str:
    """chatd.toml."""
    lines = [HEAD.rstrip()]
    for section, kind in SECTIONS.items():
        lines += ["", *_comment(_docstring(kind)), f"[{section}]"]
        for option in _options(section, kind):
            lines += ["", *_comment(option.text.replace("`", "")), f"{option.key} = {option.default}"]
    return "\n".join(lines) + "\n"


def parts() -> dict[str, str]:
    """A part for docs/configuration.md."""
    return {"options": "\n\n".join(_section(name, kind) for name, kind in SECTIONS.items())}


def _section(name: str, kind: type[Struct]) -> str:
    return "\n\n".join([f"## [{name}]", _docstring(kind), *map(_entry, _options(name, kind))])


def _entry(option: Option) -> str:
    facts = [option.kind, f"default `{option.default}`", f"`{option.variable}`"]
    facts += ["taken over by a reload"] if option.reloads else []
    return f"### `{option.section}.{option.key}`\n\n{option.text}\n\n<small>{' · '.join(facts)}</small>"


def _options(section: str, kind: type[Struct]) -> Iterator[Option]:
    texts, reloadable = _texts(kind), RELOADABLE.get(section, frozenset())
    defaults = msgspec.to_builtins(kind())
    info = types.type_info(kind)
    assert isinstance(info, types.StructType)
    for field in info.fields:
        reloads = reloadable is None or field.name in reloadable
        default = json.dumps(defaults[field.name], ensure_ascii=False)
        yield Option(section, field.name, _kind(field.type), default, reloads, texts[field.name])


def _kind(type: types.Type) -> str:
    match type:
        case types.BoolType():
            return "true or false"
        case types.IntType(ge=low, le=high):
            return "integer" + _bounds(low, high)
        case types.FloatType(gt=above, ge=low, le=high):
            return "number" + (f", above 0, {high:g} at most" if above == 0 else _bounds(low, high))
        case types.LiteralType(values=values):
            return "one of " + ", ".join(f"`{value}`" for value in values)
        case types.ListType(item_type=types.LiteralType() as item):
            return "list of " + _kind(item).removeprefix("one of ")
        case types.ListType():
            return "list of texts"
        case types.StrType():
            return "text"
    raise TypeError(f"{type}: say what this is, for people")


def _bounds(low: Any, high: Any) -> str:
    if high is None or high == MOST:
        return f", {low:g} or more"
    return f", {low:g} to {high:,}"


def _texts(kind: type[Struct]) -> dict[str, str]:
    """The docstring behind each field."""
    body = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, docstring in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(docstring, ast.Expr):
            assert isinstance(field.target, ast.Name)
            assert isinstance(docstring.value, ast.Constant)
            found[field.target.id] = inspect.cleandoc(str(docstring.value.value)).replace("\n", " ")
    return found


def _docstring(kind: type[Struct]) -> str:
    return (inspect.getdoc(kind) or "").replace("\n", " ")


def _comment(text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False, break_long_words=False
    )
