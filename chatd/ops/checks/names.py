"""Names in Redis that end as those of chatd, and that chatd does not take: those with a prefix of Laravel's."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

from chatd.bus import probe
from chatd.bus.unheard import line_for
from chatd.core.errors import OperatorError
from chatd.core.names import Names
from chatd.ingest.streams import PREFIXED
from chatd.ops.api import ApiClient, Unreachable
from chatd.ops.finding import Case, Finding, ok, warning

SUBJECT = "Redis names"
DOES = {"foreign_channels": "publishes on", "ingest_streams": "adds to"}
_NOT_LISTED = re.compile(r"^chatd_redis_not_listed_total\{(.*)\} ", re.MULTILINE)
_LABEL = re.compile(r'(\w+)=("(?:[^"\\\\]|\\\\.)*")')


def redis_names(case: Case) -> Iterator[Finding]:
    """What the daemon has heard since its start, and which streams there are."""
    redis = case.config.redis
    if not redis.url:
        return
    listed = {"foreign_channels": Names(redis.foreign_channels), "ingest_streams": Names(redis.ingest_streams)}
    found = {(option, name) for option, name in _heard(case) if option in listed}
    if redis.ingest:
        found |= {("ingest_streams", name) for name in _streams(case)}
    unlisted = sorted((option, name) for option, name in found if listed[option].entry_for(name) is None)
    for option, name in unlisted:
        yield warning(
            SUBJECT,
            f"somebody {DOES[option]} {name}, which chatd does not take",
            f"If it is yours, under [redis] in chatd.toml: {line_for(option, listed[option], name)}",
        )
    if not unlisted:
        yield ok(SUBJECT, "nobody is known to use chatd's names under another prefix")


def _heard(case: Case) -> Iterator[tuple[str, str]]:
    if not case.running:
        return
    try:
        numbers = ApiClient(case.config).ask("GET", "/metrics").body.decode(errors="replace")
    except Unreachable:
        return
    for labels in _NOT_LISTED.findall(numbers):
        values = {key: json.loads(value) for key, value in _LABEL.findall(labels)}
        yield values["option"], values["name"]


def _streams(case: Case) -> list[str]:
    """Empty where Redis does not answer, which another check says, or does not allow to look."""
    try:
        return probe.streams_like(case.config.redis, PREFIXED)
    except OperatorError:
        return []
