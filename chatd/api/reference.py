"""The page `/docs`, which shows the OpenAPI description, and the operations and objects that it is made of.

It is one HTML page without a script, so that the browser's own search finds everything in it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from html import escape
from typing import Any, NamedTuple

from quart import Blueprint, Response, current_app
from quart_schema import hide

from chatd.api.pages import headers_of, serve_files

PATH = "/docs"
FILES = {"/docs/reference.css": "docs/reference.css"}
OPEN_PATHS = frozenset([PATH, *FILES])

Json = dict[str, Any]
MOST = 2**53 - 1  # the upper bound of ids, which the page does not show

TITLES = {
    "messages": "Messages",
    "conversations": "Conversations",
    "users": "Users",
    "tokens": "Tokens",
    "health": "Health",
}


def blueprint() -> Blueprint:
    routes = Blueprint("reference", __name__)
    serve_files(routes, FILES)
    made = ""

    @routes.get(PATH)
    @hide
    async def docs() -> Response:
        nonlocal made  # generated at the first request, when all routes are registered
        made = made or page(current_app.extensions["QUART_SCHEMA"].openapi_provider.schema())
        return Response(made, content_type="text/html; charset=utf-8", headers=headers_of())

    return routes


class Field(NamedTuple):
    name: str
    kind: str  # such as "integer, 1 or more"; names of objects are in brackets: "list of [Member]"
    text: str
    required: bool
    place: str = ""  # for a parameter: path, query or header


class Operation(NamedTuple):
    method: str
    path: str
    summary: str
    text: str
    open: bool  # needs no token
    parameters: list[Field]
    body: str  # the name of an object; empty if there is no body
    answer: str
    example_body: Any
    example_answer: Any

    @property
    def anchor(self) -> str:
        words = re.sub(r"[^a-z]+", "-", self.path.removeprefix("/api/ws/").lower()).strip("-")
        return f"{self.method.lower()}-{words}"


class Thing(NamedTuple):
    """A JSON object of a request or an answer."""

    name: str
    text: str
    fields: list[Field]


def operations(description: Json) -> dict[str, list[Operation]]:
    """Return the operations by noun, in the order of `TITLES`."""
    found: dict[str, list[Operation]] = {noun: [] for noun in TITLES}
    for path, methods in description["paths"].items():
        for method, one in methods.items():
            found[one["tags"][0]].append(_operation(method.upper(), path, one))
    return found


def things(description: Json) -> list[Thing]:
    return [
        Thing(name, schema["description"], list(_fields(schema)))
        for name, schema in sorted(description["components"]["schemas"].items())
    ]


def _operation(method: str, path: str, one: Json) -> Operation:
    body, answer = _media(one.get("requestBody", {})), _media(one["responses"].get("200", {}))
    return Operation(
        method,
        path,
        one["summary"],
        one["description"],
        one.get("security") == [],
        [
            Field(
                each["name"],
                _kind(each["schema"]),
                each["description"],
                each.get("required", False),
                each["in"],
            )
            for each in one["parameters"]
        ],
        _name(body.get("schema", {})),
        _name(answer.get("schema", {})),
        body.get("example"),
        answer.get("example"),
    )


def _media(body: Json) -> Json:
    found: Json = body.get("content", {}).get("application/json", {})
    return found


def _fields(schema: Json) -> Iterator[Field]:
    required = schema.get("required", [])
    for name, value in schema["properties"].items():
        yield Field(name, _kind(value), value["description"], name in required)


def _name(schema: Json) -> str:
    return str(schema.get("$ref", "")).rpartition("/")[2]


def _kind(schema: Json) -> str:
    if "$ref" in schema:
        return f"[{_name(schema)}]"
    if "anyOf" in schema:
        return " or ".join(_kind(one) for one in schema["anyOf"])
    match schema.get("type"):
        case "array":
            return "list of " + _kind(schema["items"]) + _bounds(schema, "Items", "")
        case "object":
            return "object of " + _kind(schema["additionalProperties"])
        case "string":
            return "text" + _bounds(schema, "Length", " characters")
        case "integer" | "number":
            return str(schema["type"]) + _bounds(schema, "imum", "")
        case None:
            return "any JSON"
        case other:
            return str(other)


def _bounds(schema: Json, suffix: str, unit: str) -> str:
    low, high = schema.get(f"min{suffix}"), schema.get(f"max{suffix}")
    if high is None or high == MOST:
        return f", {low} or more" if low not in (None, 1) or high == MOST else ""
    return f", {low} to {high:,}{unit}" if low is not None else f", {high:,}{unit} at most"


def page(description: Json) -> str:
    """The whole page."""
    nouns, objects = operations(description), things(description)
    version = escape(description["info"]["version"])
    navigation = "".join(_noun_links(noun, found) for noun, found in nouns.items())
    fields = {one.name: one.fields for one in objects}
    sections = "".join(_noun(noun, found, fields) for noun, found in nouns.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>chatd: HTTP API</title>
<link rel="icon" href="data:,">
<link rel="stylesheet" href="/docs/reference.css">
</head>
<body>
<nav aria-label="Contents"><a class="home" href="#top">chatd {version}</a>
{navigation}<h2><a href="#objects">Objects</a></h2></nav>
<main id="top">
<h1>HTTP API</h1>
{INTRODUCTION}
{sections}
<h2 id="objects">Objects</h2>
{"".join(map(_object, objects))}
</main>
</body>
</html>
"""


INTRODUCTION = """\
<p>This API is for your backend. Each request carries the header <code>X-Internal-Token</code>, except for
those marked <em>open</em>. Bodies and answers are JSON. Success is always 200. An answer may hold fields that
are not listed here; ignore them.</p>
<p>An error has the same shape everywhere, <a href="#object-Error">Error</a>: <code>422</code> if a field is
wrong, <code>401</code> without the right token, <code>404</code> for what does not exist, <code>429</code> and
<code>503</code> with <code>Retry-After</code> for what you may retry. Retry a post with the same
<code>client_id</code>: chatd stores it once.</p>
<p>The same description for programs: <a href="/openapi.json">/openapi.json</a> (OpenAPI 3.1).</p>"""


def _noun_links(noun: str, found: list[Operation]) -> str:
    links = "".join(
        f'<li><a href="#{one.anchor}"><b class="{one.method.lower()}">{one.method}</b> '
        f"{_breakable(one.path.removeprefix('/api/ws'))}</a></li>"
        for one in found
    )
    return f'<h2><a href="#{noun}">{TITLES[noun]}</a></h2><ul>{links}</ul>\n'


def _noun(noun: str, found: list[Operation], fields: dict[str, list[Field]]) -> str:
    return f'<h2 id="{noun}">{TITLES[noun]}</h2>\n' + "".join(_section(one, fields) for one in found)


def _section(one: Operation, fields: dict[str, list[Field]]) -> str:
    parts = [
        f'<section id="{one.anchor}"><h3><b class="{one.method.lower()}">{one.method}</b> '
        f"<code>{_breakable(one.path)}</code>{' <em>open</em>' if one.open else ''}</h3>",
        f"<p>{_prose(one.summary)}</p>",
        f"<p>{_prose(one.text)}</p>" if one.text else "",
        _table("Parameters", one.parameters) if one.parameters else "",
        _media_part("Body", one.body, one.example_body),
        _table("Fields of the body", fields[one.body]) if one.body else "",
        _media_part("Answer", one.answer, one.example_answer),
    ]
    return "\n".join(part for part in parts if part) + "</section>\n"


def _media_part(title: str, name: str, example: Any) -> str:
    if not name:
        return ""
    link = f'<h4>{title}: <a href="#object-{name}">{name}</a></h4>'
    return link + (f"<pre><code>{escape(shown(example))}</code></pre>" if example is not None else "")


def shown(example: Any) -> str:
    """Format an example as JSON, on one line if it fits."""
    line = json.dumps(example, ensure_ascii=False)
    return line if len(line) <= 90 else json.dumps(example, ensure_ascii=False, indent=2)


def _object(thing: Thing) -> str:
    text = f"<p>{_prose(thing.text)}</p>" if thing.text else ""
    head = f'<section id="object-{thing.name}"><h3>{thing.name}</h3>'
    return f"{head}{text}{_table('Fields', thing.fields)}</section>\n"


def _table(title: str, fields: list[Field]) -> str:
    rows = "".join(
        f"<tr><td><code>{escape(field.name)}</code>{' <i>required</i>' if field.required else ''}</td>"
        f"<td>{_linked(field.kind)}{f' <i>{field.place}</i>' if field.place else ''}</td>"
        f"<td>{_prose(field.text)}</td></tr>"
        for field in fields
    )
    return f'<table aria-label="{title}"><tbody>{rows}</tbody></table>'


def _linked(kind: str) -> str:
    return re.sub(r"\[(\w+)\]", r'<a href="#object-\1">\1</a>', escape(kind))


def _prose(text: str) -> str:
    """Escape a text, and turn its `code` into HTML."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))


def _breakable(path: str) -> str:
    return escape(path).replace("/", "<wbr>/")
