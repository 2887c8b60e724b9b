"""HTTP for backends, and the demo's page: the only import of Quart and Hypercorn."""

from chatd.api.health import Health
from chatd.api.leave import Leave
from chatd.api.server import serve

__all__ = ["Health", "Leave", "serve"]
