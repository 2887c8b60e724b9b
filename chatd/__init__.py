"""chatd: a realtime chat daemon."""

__version__ = "0.1.0"
