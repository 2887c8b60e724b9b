"""Redis as Laravel speaks it: with a prefix before the names of channels and streams, and ids as text."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import redis
import structlog
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st

from chatd.bus import payloads
from chatd.core.names import Names
from chatd.observe import metrics
from tests.client import login
from tests.conftest import Daemons
from tests.daemon import Daemon
from tests.services import RedisServer

PREFIXES = ["", "laravel_database_", "laravel-database-"]  # without one, of an older Laravel, of a newer one
HINTED = 60.0  # seconds at most until the log has a hint


def publish(server: RedisServer, channel: str, **payload: Any) -> int:
    with redis.Redis.from_url(server.url, protocol=2) as client:
        heard: int = client.publish(channel, json.dumps({"conversation_id": "1"} | payload))
        return heard


def add(server: RedisServer, stream: str, content: str, id: str = "*", **fields: Any) -> None:
    body = {"conversation_id": "1", "sender_id": " 5 ", "content": content} | fields
    with redis.Redis.from_url(server.url, protocol=2) as client:
        client.xadd(stream, {"m": json.dumps(body)}, id=id)


async def until(condition: Callable[[], object], seconds: float = HINTED) -> None:
    with trio.fail_after(seconds):
        while not condition():
            await trio.sleep(0.05)


def lines(node: Daemon, event: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in node.log.splitlines() if f'"{event}"' in line]


async def redis_is_up(node: Daemon) -> None:
    await until(lambda: node.get("/readyz").json["status"] == "ok")


async def test_an_untouched_set_up_delivers(tmp_path: Path, own_redis: RedisServer) -> None:
    """The variables of the original deployment, and nothing else."""
    node = Daemon(tmp_path)
    node.environ |= {"REDIS_HOST": "127.0.0.1", "REDIS_PORT": str(own_redis.port)}
    try:
        node.start()
        await redis_is_up(node)
        async with login(node, 7, {"1": None}) as ada:
            for prefix in PREFIXES:
                publish(own_redis, f"{prefix}chat.messages", user_id=" 5 ", content=prefix)
                heard = await ada.next()
                assert heard == {"event": "message", "conversation_id": 1, "user_id": 5, "content": prefix}
            for prefix in PREFIXES:
                add(own_redis, f"{prefix}chat.ingest", f"stored {prefix}", id="1-1")
                (stored,) = await ada.messages(1)
                assert (stored["content"], stored["user_id"]) == (f"stored {prefix}", 5)
            add(own_redis, "laravel-database-chat.ingest", "x", sender_id="five")
            with redis.Redis.from_url(own_redis.url, protocol=2) as client:
                await until(lambda: client.xlen("chat.ingest.dead"))
                ((_, dead),) = client.xrange("chat.ingest.dead")
                assert dead[b"stream"] == b"laravel-database-chat.ingest"
                assert client.xlen("laravel-database-chat.ingest") == 0
    finally:
        node.close()


async def test_what_has_another_prefix_is_hinted_with_the_line_that_takes_it(
    daemons: Daemons, own_redis: RedisServer
) -> None:
    shop = {"foreign_channels": "shop_database_chat.messages", "ingest_streams": "shop_database_chat.ingest"}
    node = daemons(redis__url=own_redis.url)
    await redis_is_up(node)
    for number in range(3):
        assert publish(own_redis, shop["foreign_channels"], content=str(number)) == 1
    add(own_redis, shop["ingest_streams"], "nobody reads this")
    await until(lambda: len(lines(node, "redis_name_not_listed")) == 2)
    hints = {line["name"]: line["advice"] for line in lines(node, "redis_name_not_listed")}
    assert hints.keys() == set(shop.values())
    told = node.command("doctor", "--json")
    findings = [one for one in json.loads(told.stdout)["findings"] if one["subject"] == "Redis names"]
    for option, name in shop.items():
        line = hints[name].partition("under [redis]: ")[2]
        assert line == f"{option} = {json.dumps([*defaults(option), name])}"
        assert any(name in one["found"] and line in one["advice"] for one in findings), findings
    node.stop()

    taught = {f"redis__{option}": ",".join([*defaults(option), name]) for option, name in shop.items()}
    node = daemons(redis__url=own_redis.url, **taught)
    await redis_is_up(node)
    async with login(node, 7, {"1": 0}) as ada:
        await until(lambda: "nobody reads this" in node.get("/api/ws/conversations/1/messages").body.decode())
        (late,) = await ada.messages(1)
        publish(own_redis, shop["foreign_channels"], content="heard")
        assert (await ada.expect("message"))["content"] == "heard"
    assert late["content"] == "nobody reads this"
    assert lines(node, "redis_name_not_listed") == []


def defaults(option: str) -> list[str]:
    name = {"foreign_channels": "chat.messages", "ingest_streams": "chat.ingest"}[option]
    return [f"{prefix}{name}" for prefix in PREFIXES]


async def test_a_pattern_takes_each_once(daemons: Daemons, own_redis: RedisServer) -> None:
    add(own_redis, "shop_chat.ingest", "first")
    node = daemons(
        redis__url=own_redis.url,
        redis__foreign_channels="chat.messages,*chat.messages,s*,*",
        redis__ingest_streams="chat.*,*chat.ingest",
    )
    await redis_is_up(node)
    async with login(node, 7, {"1": 0}) as ada:
        assert [message["content"] for message in await ada.messages(1)] == ["first"]
        add(own_redis, "other_chat.ingest", "second")
        assert [message["content"] for message in await ada.messages(1, 40)] == ["second"]
        for channel in ("chat.messages", "shop_chat.messages", "s", "anything"):
            publish(own_redis, channel, content=channel)
            assert (await ada.next())["content"] == channel
        await ada.silence()
    with redis.Redis.from_url(own_redis.url, protocol=2) as client:
        assert client.xinfo_groups("chat.stream") == [], "chatd reads its own stream for others"


async def test_what_is_not_accepted_is_hinted(daemons: Daemons, own_redis: RedisServer) -> None:
    node = daemons(redis__url=own_redis.url, redis__accept_foreign="false")
    await redis_is_up(node)
    async with login(node, 7, {"1": None}) as ada:
        for _ in range(3):
            publish(own_redis, "laravel_database_chat.messages", content="x")
        await until(lambda: lines(node, "foreign_ignored"))
        await ada.silence()
    (hint,) = lines(node, "foreign_ignored")
    assert hint["channel"] == "laravel_database_chat.messages"
    assert "accept_foreign = true" in hint["advice"]


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (b"no json", "no_object"),
        (b"[1]", "no_object"),
        (b'{"conversation_id":1,"x":"' + b"x" * 70_000 + b'"}', "too_large"),
        (b'{"conversation_id":"one"}', "conversation_id"),
        (b'{"conversation_id":"01"}', "conversation_id"),
        (b'{"conversation_id":"-1"}', "conversation_id"),
        (b'{"conversation_id":1.0}', "conversation_id"),
        (b'{"conversation_id":true}', "conversation_id"),
        (b'{"conversation_id":"9007199254740992"}', "conversation_id"),
        (b'{"conversation_id":1,"event":"typing"}', "event"),
    ],
)
def test_a_refusal_is_counted_by_its_reason_and_logged_once(wrong: bytes, reason: str) -> None:
    counter = metrics.FOREIGN_REFUSED.labels(reason)._value
    before = counter.get()
    with structlog.testing.capture_logs() as logged:
        for _ in range(1000):
            assert payloads.foreign_of(wrong) is None
    assert counter.get() - before == 1000
    assert len(logged) <= 1
    assert all(line["reason"] == reason for line in logged)


def test_ids_may_be_decimal_text() -> None:
    for text in ("12", " 12 ", "12\n"):
        told = {"conversation_id": text, "id": text, "user_id": text, "content": text}
        found = payloads.foreign_of(json.dumps(told).encode())
        assert found is not None and found[0] == 12
        assert json.loads(found[2]) == told | {
            "event": "message", "conversation_id": 12, "id": 12, "user_id": 12,
        }  # fmt: skip
    found = payloads.foreign_of(b'{"event":"order.paid","conversation_id":"1","id":"5"}')
    assert found == (1, "order.paid", b'{"event":"order.paid","conversation_id":1,"id":"5"}'), "its own affair"


SIGNS = st.text("ab-^]*?[\\", max_size=7)


@pytest.fixture(scope="module")
def keys(redis_server: RedisServer) -> Any:
    with redis.Redis.from_url(redis_server.url.removesuffix("0") + "9", protocol=2) as client:
        yield client


@settings(deadline=None)
@given(pattern=SIGNS, name=st.text("ab-^]", min_size=1, max_size=4))
@example("[b-a]", "a")
@example("[]a]", "a]")
@example("[^]", "a")
@example("a[", "a[")
def test_names_are_matched_as_redis_matches_them(keys: Any, pattern: str, name: str) -> None:
    keys.flushdb()
    keys.set(name, 1)
    taken = Names([f"*{pattern}"]).entry_for(name) is not None
    assert taken == bool(keys.keys(f"*{pattern}"))


def test_a_pattern_with_many_stars_is_matched_at_once() -> None:
    began = time.monotonic()
    Names(["*a" * 50 + "*b", "[" * 1000]).entry_for("a" * 200)
    assert time.monotonic() - began < 5
