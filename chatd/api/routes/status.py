"""`/status`: a page with the daemon's state, for an operator without Grafana. Like /metrics it needs no token
and shows no ids.
"""

from __future__ import annotations

import platform
import time

from quart import Blueprint, Response
from quart_schema import hide

from chatd import __version__
from chatd.api.health import Health
from chatd.api.pages import serve_files
from chatd.api.schemas import answer
from chatd.observe.sampler import PERIOD, POINTS, Sampler

FILES = {
    "/status": "status/monitor.html",
    "/status/monitor.js": "status/monitor.js",
    "/status/monitor.css": "status/monitor.css",
}
DATA = "/status/data"
OPEN_PATHS = frozenset([*FILES, DATA, "/favicon.ico"])


def blueprint(health: Health, sampler: Sampler, node: str) -> Blueprint:
    routes = Blueprint("status", __name__)
    serve_files(routes, FILES)
    started = time.time()

    @routes.get(DATA)
    @hide
    async def data() -> Response:
        _, ready = await health.report()
        facts = {
            "version": __version__,
            "python": platform.python_version(),
            "node": node,
            "uptime": round(time.time() - started),
            "health": ready,
            "period": PERIOD,
            "most": POINTS,
            "points": list(sampler.points),  # oldest first
        }
        return answer(facts)

    return routes
