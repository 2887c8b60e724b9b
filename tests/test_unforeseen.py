"""An error that nobody foresaw ends the process with a code, while another of its threads waits for ever."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.daemon import Daemon
from tests.services import RedisServer

PLACES = [
    "chatd.bus.readers:StreamReader._read",
    "chatd.bus.readers:StreamReader._take_batches",
    "chatd.bus.pubsub:PubSubReader._listen",
    "chatd.bus.publisher:Publisher._publish_groups",
    "chatd.bus.publisher:Publisher._publish_passing",
    "chatd.bus.publisher:Publisher.relay_foreign",
    "chatd.ingest.consumer:Consumer.run",
    "chatd.store.write.writer:Writer.run",
    "chatd.hub.fanout.fanout:Fanout.run",
    "chatd.hub.fanout.sweep:Sweep.run",
    "chatd.hub.server:Hub.serve",
    "chatd.chat.presence:Presence.run",
    "chatd.chat.typing:Typing.run",
    "chatd.observe.sampler:Sampler.run",
    "chatd.daemon.retention:RetentionClock.run",
]


class Planted(Daemon):
    place = ""

    def program(self) -> list[str]:
        return [sys.executable, "-m", "tests.unforeseen", self.place]


@pytest.mark.parametrize("place", PLACES)
def test_an_unforeseen_error_ends_the_process(tmp_path: Path, own_redis: RedisServer, place: str) -> None:
    daemon = Planted(tmp_path, redis__url=own_redis.url)
    daemon.place = place
    try:
        daemon.start()
        assert daemon.wait() == 1, daemon.log
        assert "LookupError('planted')" in daemon.log
    finally:
        daemon.close()
