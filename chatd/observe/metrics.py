"""The metrics for Prometheus at /metrics. Labels never have ids of users or conversations.

This module defines the metrics; the other modules count.
"""

from __future__ import annotations

import os
from collections import Counter as Tally
from collections.abc import Iterable
from typing import Any

from prometheus_client import (
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    values,
)
from prometheus_client.exposition import choose_encoder
from prometheus_client.multiprocess import MultiProcessCollector

from chatd.core.errors import ChatError

# Each of several workers counts in files of its own, and the worker that gets a request adds
# up all files. They are named by the worker's number instead of its pid, so that a restarted
# worker continues the counters of the old one.
SHARED = "PROMETHEUS_MULTIPROC_DIR" in os.environ
if SHARED and "CHATD_WORKER_NUMBER" in os.environ:
    values.ValueClass = values.MultiProcessValue(lambda: os.environ["CHATD_WORKER_NUMBER"])  # type: ignore[no-untyped-call]

disable_created_metrics()  # type: ignore[no-untyped-call]  # the start times of counters are useless

# Buckets in seconds, for the event loop and for operations that a user waits for.
FINE = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BYTES = (1024, 4096, 16_384, 65_536, 262_144, 524_288, 1_048_576)

# The process.
BUILD = Gauge(
    "chatd_build_info",
    "1, with the version of chatd and Python and the kind of database",
    ["version", "python", "db"],
    multiprocess_mode="livemostrecent",
)
LOOP_LAG = Histogram("chatd_eventloop_lag_seconds", "How late the event loop wakes a task", buckets=FINE)
RELOADED = Gauge(
    "chatd_config_last_reload_success", "1 unless the last reload was refused", multiprocess_mode="livemin"
)
RELOADED_AT = Gauge(
    "chatd_config_last_reload_timestamp_seconds",
    "Time of chatd's last attempt to read its configuration, in unix seconds",
    multiprocess_mode="livemostrecent",
)

# Connections.
CONNECTIONS = Gauge(
    "chatd_connections",
    "WebSocket connections now: connecting, or ready once they are authenticated",
    ["state"],
    multiprocess_mode="livesum",
)
CONNECTING, READY = CONNECTIONS.labels("connecting"), CONNECTIONS.labels("ready")
USERS = Gauge("chatd_users", "Users who are connected now", multiprocess_mode="livesum")
ROOMS = Gauge("chatd_rooms", "Conversations with at least one subscription now", multiprocess_mode="livesum")
SUBSCRIPTIONS = Gauge("chatd_subscriptions", "Subscriptions now", multiprocess_mode="livesum")
OPENED = Counter("chatd_connections_opened_total", "WebSocket connections that chatd accepted")
CLOSED = Counter("chatd_connections_closed_total", "WebSocket connections that ended", ["code"])
FAILED = Counter("chatd_connections_failed_total", "Connections that ended in a broken protocol or an error")
SLOW = Counter("chatd_slow_disconnects_total", "Connections of slow consumers that chatd cut")
REJECTED = Counter("chatd_handshakes_rejected_total", "WebSocket handshakes refused", ["reason"])
AUTH_SECONDS = Histogram("chatd_auth_seconds", "Time that the backend took to name the user of a token")
AUTH_FAILURES = Counter(
    "chatd_auth_failures_total", "Logins that chatd refused, or that the backend did not decide", ["reason"]
)
RATE_LIMITED = Counter(
    "chatd_rate_limited_total", "Requests that chatd refused because they came too often", ["kind"]
)
PING_RTT = Histogram("chatd_ping_rtt_seconds", "Time in which a client answered a ping", buckets=FINE)
UNKNOWN_ENDED = Counter(
    "chatd_unknown_connections_ended_total",
    "Connections that had shown no login or token yet, and that chatd ended to make room for others",
    ["port"],
)
HTTP_FAILED = Counter("chatd_http_connections_failed_total", "HTTP connections that ended in an error")

# Messages in.
POSTED = Counter(
    "chatd_messages_posted_total", "New messages by outcome: ok, duplicate, or an error's code", ["outcome"]
)
COMMANDS = Counter("chatd_commands_total", "Commands to the database, by outcome", ["outcome"])
POST_SECONDS = Histogram(
    "chatd_post_duration_seconds", "Time of one POST /api/ws/messages", ["outcome"], buckets=FINE
)
DB_SECONDS = Histogram(
    "chatd_db_duration_seconds", "Time of one group commit, or of one read", ["op"], buckets=FINE
)
COMMIT_SECONDS, READ_SECONDS = DB_SECONDS.labels("commit"), DB_SECONDS.labels("read")
DB_POOL = Gauge(
    "chatd_db_pool_in_use", "Database connections that are reading now", multiprocess_mode="livesum"
)
BLOCKS = Gauge(
    "chatd_memory_blocks",
    "Blocks of memory that Python holds; they grow if something leaks",
    multiprocess_mode="livesum",
)
STATEMENTS = Counter("chatd_statements_total", "SQL statements, of the writer and of the readers", ["engine"])

SQLITE_LOG = Gauge(
    "chatd_sqlite_log_bytes", "Size of SQLite's log (chatd.db-wal)", multiprocess_mode="mostrecent"
)
PRUNED = Counter("chatd_messages_pruned_total", "Messages that retention has removed")

# Messages out.
DELIVERED = Counter(
    "chatd_messages_delivered_total",
    "Changes given to a connection: live, or in an answer (replay)",
    ["source"],
)
DELIVERED_LIVE, DELIVERED_REPLAY = DELIVERED.labels("live"), DELIVERED.labels("replay")
DELIVERY_LAG = Histogram(
    "chatd_delivery_lag_seconds",
    "Time from the oldest commit of a batch until all sockets of this node had its changes",
    buckets=FINE,
)
FANOUT_SECONDS = Histogram("chatd_fanout_duration_seconds", "Time to hand a batch to its rooms", buckets=FINE)
QUEUE_DEPTH = Histogram(
    "chatd_send_queue_depth",
    "Bytes that wait for a client, measured each time that not everything could be sent",
    buckets=BYTES,
)
SHED = Counter("chatd_shed_total", "Ephemeral events that chatd dropped for slow consumers")
GAP_FILLS = Counter("chatd_gap_fills_total", "Gaps in the changes that chatd filled from the database")
BEHIND = Counter(
    "chatd_fallen_behind_total",
    "Times that a live subscription had no room for a change and chatd read it from the database later",
)
RESETS = Counter("chatd_resets_total", "Subscriptions that had to start over", ["reason"])
OTHER_HISTORIES = Counter(
    "chatd_other_histories_total", "Rooms that had to start over because the database was restored"
)
RECOVERIES = Counter("chatd_recoveries_total", "Subscriptions that started with a cursor", ["recovered"])

# Redis and the backend.
REDIS_UP = Gauge(
    "chatd_redis_up", "1 while every link to Redis works, or none is configured", multiprocess_mode="livemin"
)
REDIS_RECONNECTS = Counter("chatd_redis_reconnects_total", "Reconnects to Redis")
OUTBOX_PENDING = Gauge(
    "chatd_outbox_pending", "Groups of all nodes that Redis does not have yet", multiprocess_mode="livemax"
)
OUTBOX_OLDEST = Gauge(
    "chatd_outbox_oldest_seconds", "Age of the oldest group in the outbox", multiprocess_mode="livemax"
)
OUTBOX_RELAYED = Counter(
    "chatd_outbox_relayed_total", "Groups that chatd published late, after an outage or a crash"
)
OUTBOX_EXPIRED = Counter(
    "chatd_outbox_expired_total", "Groups that chatd gave up because they were too old to publish"
)
INGESTED = Counter("chatd_ingested_total", "Entries of chat.ingest that chatd committed")
INGEST_REFUSED = Counter("chatd_ingest_refused_total", "Entries of chat.ingest that chatd refused", ["code"])
FOREIGN_REFUSED = Counter(
    "chatd_foreign_refused_total", "Payloads of other services that chatd refused", ["reason"]
)
NOT_LISTED = Counter(
    "chatd_redis_not_listed_total",
    "Uses of a name in Redis that ends as one of chatd's, but is not listed",
    ["option", "name"],
)
WEBHOOKS_SENT = Counter("chatd_webhooks_sent_total", "Events that the backend accepted", ["event"])
WEBHOOKS_FAILED = Counter("chatd_webhooks_failed_total", "Failed attempts to deliver an event")
# Nothing is dropped since 0.2. The name stays for a version, so that rules that use it still find it.
Counter("chatd_webhooks_dropped_total", "Always 0 since 0.2: chatd drops no events of presence any more")
WEBHOOKS_WAITING = Gauge(
    "chatd_webhooks_waiting", "Events that are not delivered yet", multiprocess_mode="mostrecent"
)
WEBHOOKS_DEAD = Gauge("chatd_webhooks_dead", "Events that chatd gave up", multiprocess_mode="mostrecent")
HOOK_SECONDS = Histogram("chatd_hook_seconds", "Time that the backend took to judge a message")
HOOK_FAILURES = Counter(
    "chatd_hook_failures_total", "Messages and edits that the backend did not judge", ["reason"]
)
BACKEND_ANSWERS = Gauge(
    "chatd_backend_answers",
    "1 while the last call of this kind (auth, before_message) was answered, else 0",
    ["call"],
    multiprocess_mode="mostrecent",
)


def exposition(accept: str = "") -> tuple[bytes, str]:
    """(metrics of this process or of all workers, their content type), in the format that `accept` asks for."""
    try:
        encode, content_type = choose_encoder(accept)
    except (TypeError, ValueError):  # an unreadable header gets the default format
        encode, content_type = choose_encoder("")
    return encode(_registry()), content_type


def _registry() -> CollectorRegistry:
    if not SHARED:
        return REGISTRY
    registry = CollectorRegistry()
    MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
    return registry


def samples() -> dict[str, float]:
    """name → value, summed over labels; a histogram's bucket is `name{0.1}`.

    This takes some milliseconds, so call it in a thread.
    """
    found: dict[str, float] = {}
    for family in _registry().collect():
        for sample in family.samples:
            bound = sample.labels.get("le")
            name = f"{sample.name}{{{bound}}}" if bound else sample.name
            found[name] = found.get(name, 0.0) + sample.value
    return found


def count_outcomes(counter: Counter, outcomes: Iterable[Any]) -> None:
    """Count outcomes in a counter that has a label `outcome`."""
    for name, count in Tally(map(_name, outcomes)).items():
        counter.labels(name).inc(count)


def _name(outcome: Any) -> str:
    if isinstance(outcome, ChatError):
        return outcome.code
    return "duplicate" if getattr(outcome, "duplicate", False) else "ok"
