"""Observability: logs, metrics, and the samples that /status shows."""
