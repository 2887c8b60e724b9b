"""Serves files of chatd/web over the API, with the security headers of a page.

`web/client` is a symbolic link to clients/js, where the client library is an npm package. A wheel has copies of
its files.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from importlib import resources

from quart import Blueprint, Response
from quart_schema import hide

_TYPES = {"html": "text/html", "css": "text/css", "js": "text/javascript"}


def serve_files(routes: Blueprint, files: Mapping[str, str], *, sockets: str = "") -> None:
    """Add a route for each file. `files`: URL path → file below chatd/web. The palette of all pages is put
    before each style sheet. `sockets`: origins to which a page may connect in addition to its own.
    """
    headers = headers_of(sockets)
    for path, file in files.items():
        endpoint = file.replace("/", "-").replace(".", "-")
        routes.add_url_rule(path, endpoint, hide(_view(file, headers)), methods=["GET"])


def headers_of(sockets: str = "") -> dict[str, str]:
    """Return the headers that restrict what a page may load, and from where."""
    return {
        "Content-Security-Policy": (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
            f"connect-src 'self' {sockets}; base-uri 'none'; frame-ancestors 'none'; form-action 'none'; "
            "require-trusted-types-for 'script'"
        ),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _view(file: str, headers: dict[str, str]) -> Callable[[], Awaitable[Response]]:
    web = resources.files("chatd") / "web"
    content = (web / file).read_bytes()
    if file.endswith(".css"):
        content = (web / "palette.css").read_bytes() + content
    content_type = f"{_TYPES[file.rpartition('.')[2]]}; charset=utf-8"

    async def view() -> Response:
        return Response(content, content_type=content_type, headers=headers)

    return view
