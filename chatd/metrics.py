"""Numbers for Prometheus, shown at /metrics. No user or conversation ids in labels.

Counted where things happen; this says what is counted and under which name.
"""

from __future__ import annotations

import os
from collections import Counter as Tally
from collections.abc import Iterable
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest, values
from prometheus_client.multiprocess import MultiProcessCollector

from chatd.errors import ChatError

# One of several workers: each counts in files of its own, which whoever is asked adds up. They are named after
# the worker's number, not its pid: one that was restarted counts on where the one before it ended.
SHARED = "PROMETHEUS_MULTIPROC_DIR" in os.environ
if SHARED and "CHATD_WORKER_NUMBER" in os.environ:
    values.ValueClass = values.MultiProcessValue(lambda: os.environ["CHATD_WORKER_NUMBER"])  # type: ignore[no-untyped-call]

CONNECTIONS = Gauge("chatd_connections", "WebSocket connections now", multiprocess_mode="livesum")
CLOSED = Counter("chatd_connections_closed_total", "WebSocket connections that ended", ["code"])
REFUSED = Counter("chatd_handshakes_refused_total", "WebSocket handshakes refused", ["reason"])
FAILED = Counter("chatd_connections_failed_total", "Connections that ended in a broken protocol or an error")
HTTP_FAILED = Counter("chatd_http_connections_failed_total", "HTTP connections that ended in an error")
STATEMENTS = Counter("chatd_statements_total", "SQL statements, of the writer and of the readers", ["engine"])
WRITES = Counter("chatd_writes_total", "Commands by outcome", ["outcome"])
COMMIT_SECONDS = Histogram("chatd_commit_seconds", "Time of one group commit")
DELIVERED = Counter("chatd_deliveries_total", "Changes handed to a connection")
SHED = Counter("chatd_shed_total", "Ephemeral events left out for a connection that reads too slowly")
REPAIRS = Counter("chatd_repairs_total", "Holes that were read from the database")
RESYNCS = Counter("chatd_resyncs_total", "Subscriptions told to start over")
REDIS_UP = Gauge(
    "chatd_redis_up", "1 while every link to Redis works, or none is configured", multiprocess_mode="livemin"
)
AUTH_SECONDS = Histogram("chatd_auth_seconds", "Time in which the backend said whose a token is")
AUTH_FAILURES = Counter("chatd_auth_failures_total", "Logins that the backend did not decide", ["reason"])
WEBHOOKS_SENT = Counter("chatd_webhooks_sent_total", "Events that the backend took", ["event"])
WEBHOOKS_FAILED = Counter("chatd_webhooks_failed_total", "Attempts to deliver an event that failed")
WEBHOOKS_DROPPED = Counter(
    "chatd_webhooks_dropped_total", "Events of presence left out: too many waited already"
)
WEBHOOKS_WAITING = Gauge(
    "chatd_webhooks_waiting", "Events that were not delivered yet", multiprocess_mode="mostrecent"
)
WEBHOOKS_DEAD = Gauge("chatd_webhooks_dead", "Events that were given up", multiprocess_mode="mostrecent")
HOOK_SECONDS = Histogram("chatd_hook_seconds", "Time in which the backend judged a message")
RELOADED = Gauge(
    "chatd_config_last_reload_success", "1 unless the last reload was refused", multiprocess_mode="livemin"
)
RELOADED_AT = Gauge(
    "chatd_config_last_reload_timestamp_seconds",
    "When the configuration was read last, or was to be",
    multiprocess_mode="livemostrecent",
)
INGESTED = Counter("chatd_ingested_total", "Entries of chat.ingest that were committed")
INGEST_REFUSED = Counter("chatd_ingest_refused_total", "Entries of chat.ingest that were refused", ["code"])
OUTBOX_RELAYED = Counter("chatd_outbox_relayed_total", "Groups published late, after an outage or a crash")
OUTBOX_EXPIRED = Counter("chatd_outbox_expired_total", "Groups given up, too old to publish")


def exposition() -> bytes:
    """What /metrics answers: the numbers of this process, or of all workers."""
    if not SHARED:
        return generate_latest()
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return generate_latest(registry)


def count_outcomes(outcomes: Iterable[Any]) -> None:
    found = Tally(outcome.code if isinstance(outcome, ChatError) else "ok" for outcome in outcomes)
    for name, count in found.items():
        WRITES.labels(name).inc(count)
