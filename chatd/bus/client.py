"""Makes Redis clients for chatd. chatd itself does the retries and reconnects."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import redis
import trio
from redis.backoff import NoBackoff
from redis.retry import Retry

from chatd.config import Redis, redis_url

STREAM, MESSAGES, SIGNALS = "chat.stream", "chat.messages", "chat.signals"
SOCKET_TIMEOUT = 2.0  # seconds
# Redis does not answer, or the process has no file descriptor left: redis-py opens a file when it connects.
LOST = (redis.RedisError, OSError)


def client_of(config: Redis) -> redis.Redis:
    place = redis_url.read(config.url)
    tls = {
        "ssl_ca_certs": place.ca_certs,
        "ssl_certfile": place.certfile,
        "ssl_keyfile": place.keyfile,
        "ssl_cert_reqs": "required" if place.verify else "none",
        "ssl_check_hostname": place.check_hostname,
    }
    return redis.Redis(
        host=place.host,
        port=place.port,
        unix_socket_path=place.socket,
        db=place.db,
        username=place.username,
        password=place.password,
        ssl=place.tls,
        **(tls if place.tls else {}),  # type: ignore[arg-type]
        protocol=2,  # with RESP3, redis-py formats a log line for every pub/sub message
        retry=Retry(NoBackoff(), 0),  # redis-py's own retries could publish twice
        socket_timeout=SOCKET_TIMEOUT,
        socket_connect_timeout=SOCKET_TIMEOUT,
    )


def last_id(client: redis.Redis) -> str:
    newest: Any = client.xrevrange(STREAM, count=1)
    return newest[0][0].decode() if newest else "0-0"


def order(stream_id: str) -> tuple[int, int]:
    time, _, number = stream_id.partition("-")
    return int(time), int(number)


async def in_thread(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run a call that waits for Redis in a thread.

    It has a limiter of its own, so that it blocks no other threads.
    """
    return await trio.to_thread.run_sync(work, *arguments, limiter=trio.CapacityLimiter(1))
