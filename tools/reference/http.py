"""The routes for docs/http.md, from the OpenAPI description."""

from __future__ import annotations

import re
from typing import Any, cast

from chatd.api.app import create_app
from chatd.api.reference import TITLES, Field, Operation, Thing, operations, shown, things
from chatd.config import Config
from chatd.config.settings import Settings


def parts() -> dict[str, str]:
    described = description()
    nouns = [_noun(noun, found) for noun, found in operations(described).items()]
    return {"routes": "\n\n".join(nouns), "objects": "\n\n".join(map(_object, things(described)))}


def description() -> dict[str, Any]:
    """As `/openapi.json` has it. The routes are described without being served, so they need no chat."""
    nothing: Any = None
    app = create_app(Settings(Config()), nothing, nothing, nothing, "")
    return cast(dict[str, Any], app.extensions["QUART_SCHEMA"].openapi_provider.schema())


def _noun(noun: str, found: list[Operation]) -> str:
    return "\n\n".join([f"## {TITLES[noun]}", *map(_operation, found)])


def _operation(one: Operation) -> str:
    parts = [f"### {one.method} `{one.path}`", one.summary]
    parts += [one.text.replace("\n", " ")] if one.text else []
    parts += ["No token is needed."] if one.open else []
    parts += [_table(one.parameters)] if one.parameters else []
    for title, name, example in (
        ("Body", one.body, one.example_body),
        ("Answer", one.answer, one.example_answer),
    ):
        parts += [f"{title}: [{name}](#{name.lower()})"] if name else []
        parts += [f"```json\n{shown(example)}\n```"] if example is not None else []
    return "\n\n".join(parts)


def _object(thing: Thing) -> str:
    parts = [f"### {thing.name}", thing.text.replace("\n", " "), _table(thing.fields)]
    return "\n\n".join(part for part in parts if part)


def _table(fields: list[Field]) -> str:
    rows = [
        f"| `{field.name}`{' *required*' if field.required else ''} | {_linked(field.kind)}"
        f"{f', in the {field.place}' if field.place else ''} | {field.text} |"
        for field in fields
    ]
    return "\n".join(["| | | |", "|---|---|---|", *rows])


def _linked(kind: str) -> str:
    return re.sub(r"\[(\w+)\]", lambda found: f"[{found[1]}](#{found[1].lower()})", kind)
