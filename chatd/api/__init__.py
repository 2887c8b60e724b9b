"""The HTTP API for backends, and the demo's page. No other package imports Quart or Hypercorn."""

from chatd.api.health import Health
from chatd.api.leave import Leave
from chatd.api.server import serve

__all__ = ["Health", "Leave", "serve"]
