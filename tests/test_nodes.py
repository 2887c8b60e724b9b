"""Two daemons on one PostgreSQL and one Redis: what one accepts both deliver, whatever happens to Redis."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import redis
import trio
from sqlalchemy import create_engine, text

from chatd.bus.readers import fitting_count
from chatd.bus.signals import WaitingSignals
from tests.client import Client, login
from tests.daemon import Daemon
from tests.services import PostgresServer, RedisServer

SWEEP = 10.0  # seconds; what heals without Redis heals within one


class Pair:
    """Two nodes, and a look at what Redis carries."""

    def __init__(self, nodes: list[Daemon], server: RedisServer, database_url: str) -> None:
        self.first, self.second = nodes
        self.server = server
        self.engine = create_engine(database_url.replace("postgresql://", "postgresql+psycopg://"))

    def scalar(self, query: str) -> Any:
        with self.engine.connect() as connection:
            return connection.scalar(text(query))


@pytest.fixture
def pair(
    tmp_path_factory: pytest.TempPathFactory, own_redis: RedisServer, postgres: PostgresServer
) -> Iterator[Pair]:
    url = postgres.create_database()
    settings = {
        "database__url": url,
        "redis__url": own_redis.url,
        "redis__accept_foreign": "true",
        "limits__sends_per_second": 0,
    }
    nodes = [Daemon(tmp_path_factory.mktemp("node"), **settings) for _ in range(2)]
    migrated = nodes[0].command("migrate")
    assert migrated.returncode == 0, migrated.stderr
    for node in nodes:
        node.start()
    both = Pair(nodes, own_redis, url)
    yield both
    both.engine.dispose()
    for node in nodes:
        node.close()


def client_of(server: RedisServer) -> redis.Redis:
    return redis.Redis.from_url(server.url, protocol=2)


async def wait_until_ready(node: Daemon, status: str, patience: float = 15.0) -> None:
    with trio.fail_after(patience):
        while (await trio.to_thread.run_sync(node.get, "/readyz")).json["status"] != status:
            await trio.sleep(0.05)


async def post_many(node: Daemon, conversation: int, contents: list[str]) -> None:
    for content in contents:
        await trio.to_thread.run_sync(node.post, conversation, 1, content)


async def expect_all(client: Client, contents: list[str], patience: float = 10.0) -> None:
    """Exactly these, in seq order, each once."""
    messages = await client.messages(len(contents), patience)
    assert [m["content"] for m in messages] == contents
    first = messages[0]["seq"]
    assert [m["seq"] for m in messages] == list(range(first, first + len(contents)))


async def test_what_is_posted_to_one_node_both_deliver_in_order(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    async with login(pair.first, 1, {"1": None}) as here, login(pair.second, 2, {"1": None}) as there:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(post_many, pair.first, 1, [f"a{n}" for n in range(50)])
            nursery.start_soon(post_many, pair.second, 1, [f"b{n}" for n in range(50)])
        heard = [await client.messages(100) for client in (here, there)]
        assert heard[0] == heard[1]
        assert [m["seq"] for m in heard[0]] == list(range(1, 101))
        for sender in "ab":
            assert [m["content"] for m in heard[0] if m["content"][0] == sender] == [
                f"{sender}{n}" for n in range(50)
            ]
        await here.silence()
        await there.silence()


async def test_redis_shows_the_traffic(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    client = client_of(pair.server)
    with client.pubsub(ignore_subscribe_messages=True) as listener:
        listener.subscribe("chat.messages")
        listener.get_message(timeout=1)
        stored = await trio.to_thread.run_sync(pair.first.post, 1, 1, "Hello")
        published = await trio.to_thread.run_sync(lambda: listener.get_message(timeout=5))
    assert published is not None
    payload = json.loads(published["data"])
    node = payload.pop("node")
    assert len(payload["mark"]) == 8
    assert payload == {
        "event": "message",
        "conversation_id": 1,
        "id": stored["id"],
        "user_id": 1,
        "type": "text",
        "content": "Hello",
        "meta": None,
        "created_at": stored["created_at"],
        "seq": 1,
        "client_id": None,
        "mark": payload["mark"],
    }
    ((_, entry),) = client.xrange("chat.stream")
    assert json.loads(entry[b"m"]) == payload
    assert entry[b"n"].decode() == node
    client.close()


async def test_a_foreign_payload_is_delivered_once_by_both(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    async with login(pair.first, 1, {"1": None}) as here, login(pair.second, 2, {"1": None}) as there:
        client = client_of(pair.server)
        client.publish("chat.messages", b"no json")
        client.publish("chat.messages", b'{"conversation_id":"one"}')
        client.publish("chat.messages", b'{"conversation_id":1,"node":"somebody"}')
        client.publish("chat.messages", b'{"conversation_id":1,"content":"from outside","seq":99}')
        client.publish("chat.messages", b'{"event":"order.paid","conversation_id":1,"sum":5}')
        client.publish("chat.messages", b'{"event":"ready","conversation_id":1}')  # a name of ours: refused
        client.close()
        for listener in (here, there):
            assert await listener.next() == {
                "event": "message",
                "conversation_id": 1,
                "content": "from outside",
            }
            assert await listener.next() == {"event": "order.paid", "conversation_id": 1, "sum": 5}
            await listener.silence()
        stored = await trio.to_thread.run_sync(pair.first.post, 1, 1, "stored")
        assert stored["seq"] == 1
        assert (await there.expect("message"))["seq"] == 1


async def test_while_redis_is_dead_nothing_is_lost_doubled_or_disordered(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    before, during, after = ([f"{when}{n}" for n in range(30)] for when in ("before", "during", "after"))
    async with login(pair.first, 1, {"1": None}) as here, login(pair.second, 2, {"1": None}) as there:
        await post_many(pair.first, 1, before)
        await expect_all(here, before, patience=2)
        pair.server.kill()
        await post_many(pair.first, 1, during)
        await expect_all(here, during, patience=2)
        await wait_until_ready(pair.first, "degraded")
        await expect_all(there, before + during, patience=SWEEP)

        pair.server.start()
        await wait_until_ready(pair.first, "ok")
        await wait_until_ready(pair.second, "ok")
        await post_many(pair.first, 1, after)
        await expect_all(here, after)
        await expect_all(there, after)
        await here.silence()
        await there.silence()
    client = client_of(pair.server)
    relayed = [json.loads(entry[b"m"])["content"] for _, entry in client.xrange("chat.stream")]
    client.close()
    # Other services get every change at least once; the dead Redis took the first ones with it.
    assert set(during + after) <= set(relayed)
    with trio.fail_after(10):
        while pair.scalar("SELECT count(*) FROM chat_outbox"):
            await trio.sleep(0.1)


async def test_a_paused_redis_does_not_delay_an_acknowledgement(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    async with login(pair.first, 1, {"1": None}) as here:
        pair.server.pause()
        try:
            with trio.fail_after(5):
                await post_many(pair.first, 1, [f"m{n}" for n in range(20)])
                await expect_all(here, [f"m{n}" for n in range(20)])
        finally:
            pair.server.resume()


async def test_what_redis_forgets_is_found_by_the_sweep(pair: Pair) -> None:
    """The last message of a burst leaves no hole behind when it is lost: only the sweep can know."""
    await wait_until_ready(pair.second, "ok")
    async with login(pair.second, 2, {"1": None}) as there:
        await trio.to_thread.run_sync(pair.first.post, 1, 1, "heard")
        await expect_all(there, ["heard"])
        with pair.engine.begin() as connection:
            insert_as_a_dead_node(connection, 1, seq=2, told=True)
        await expect_all(there, ["from the dead"], patience=SWEEP + 2)


async def test_a_dead_nodes_outbox_is_relayed_by_another(pair: Pair, own_redis: RedisServer) -> None:
    await wait_until_ready(pair.first, "ok")
    with pair.engine.begin() as connection:
        insert_as_a_dead_node(connection, 7, seq=1)
    client = client_of(own_redis)
    with trio.fail_after(15):
        while not (entries := client.xrange("chat.stream")):
            await trio.sleep(0.1)
    client.close()
    assert [(entry[b"n"], json.loads(entry[b"m"])["content"]) for _, entry in entries] == [
        (b"dead", "from the dead")
    ]
    assert pair.scalar("SELECT count(*) FROM chat_outbox") == 0


async def test_a_flushed_redis_is_only_a_detour(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    async with login(pair.second, 2, {"1": None}) as there:
        await post_many(pair.first, 1, ["a", "b"])
        client = client_of(pair.server)
        client.flushall()
        client.close()
        await post_many(pair.first, 1, ["c", "d"])
        await expect_all(there, ["a", "b", "c", "d"], patience=SWEEP)
        await there.silence()


async def test_no_payload_in_redis_ends_a_node(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    client = client_of(pair.server)
    deep = b"[" * 1000 + b"]" * 1000
    for payload in (b"", b"\xff", b'{"event":"\xff","conversation_id":1,"seq":1}', b'{"a":' + deep + b"}"):
        client.xadd("chat.stream", {"m": payload})
        client.xadd("chat.stream", {"n": payload, "v": payload})
        client.publish("chat.signals", payload)
        client.publish("chat.messages", payload)
    client.publish("chat.signals", b'{"signal":"member","node":"\xff"}')
    client.publish("chat.messages", b'{"conversation_id":1,"x":"\xff"}')
    client.xadd("chat.stream", {"m": b'{"event":"message","conversation_id":1,"seq":1,"x":' + deep + b"}"})
    client.close()
    async with login(pair.second, 2, {"1": None}) as there:
        await post_many(pair.first, 1, ["still here"])
        await expect_all(there, ["still here"])


async def test_a_removal_that_redis_did_not_take_is_seen_before_the_next_message(pair: Pair) -> None:
    """G6 without signals: what is committed after a removal says so itself."""
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    async with login(pair.second, 2, {"1": None}) as there:
        await post_many(pair.second, 1, ["heard"])
        await expect_all(there, ["heard"])
        with pair.engine.begin() as connection:  # by a node whose link to Redis is cut
            connection.execute(text("INSERT INTO chat_members VALUES (1, 2, 'removed', NULL, NULL, now())"))
            versions = "members_version = members_version + 1, removed_version = members_version + 1"
            connection.execute(text(f"UPDATE chat_conversations SET {versions}"))
        await post_many(pair.second, 1, ["unheard"])
        await post_many(pair.first, 1, ["unheard too"])
        assert (await there.expect("unsubscribed", patience=1))["code"] == "not_found"
        await there.silence()


async def test_a_removal_outlives_a_publish_that_failed(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    async with login(pair.second, 2, {"1": None}) as there:
        client = client_of(pair.server)
        client.client_pause(3000, all=False)  # writes alone: the other node's links stay up
        client.close()
        await trio.to_thread.run_sync(pair.first.request, "DELETE", "/api/ws/conversations/1/members/2")
        ended = await there.expect("unsubscribed", patience=7)  # well before a sweep
        assert ended["code"] == "not_found"


async def disconnect(node: Daemon, user_id: int, *, reconnect: bool = True) -> None:
    path = f"/api/ws/users/{user_id}/disconnect"
    answer = await trio.to_thread.run_sync(node.request, "POST", path, {"reconnect": reconnect})
    assert answer.status == 200


async def test_a_kick_while_redis_is_away_reaches_the_other_node_when_it_is_back(pair: Pair) -> None:
    """Those who were there, and nobody who came after it."""
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    async with login(pair.second, 2, {"1": None}) as before, login(pair.second, 3, {"1": None}) as other:
        await trio.to_thread.run_sync(pair.server.kill)
        await wait_until_ready(pair.first, "degraded")
        await disconnect(pair.first, 2)
        async with login(pair.second, 2, {"1": None}) as after:
            await trio.to_thread.run_sync(pair.server.start)
            assert (await before.closed(15.0))[0] == 4003
            await wait_until_ready(pair.second, "ok")
            await after.request("send", conversation_id=1, content="still here")
            await other.messages(1)
            await disconnect(pair.first, 2)
            assert (await after.closed(5.0))[0] == 4003
        await disconnect(pair.first, 3, reconnect=False)
        assert (await other.closed(5.0))[0] == 4503


async def test_a_kick_reaches_a_node_that_is_cut_off_from_redis(pair: Pair) -> None:
    """Its links are cut just then, and nobody else's."""
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    async with login(pair.second, 2, {"1": None}) as there:
        pair.second.signal(signal.SIGSTOP)
        client = client_of(pair.server)
        client.client_kill_filter(_type="pubsub", skipme=True)
        await disconnect(pair.first, 2)
        with trio.fail_after(5):
            while not client.exists("chat.kicks"):
                await trio.sleep(0.02)
        for one in client.client_list():
            if one["id"] != str(client.client_id()):
                client.client_kill_filter(_id=one["id"])
        client.close()
        pair.second.signal(signal.SIGCONT)
        assert (await there.closed(15.0))[0] == 4003


async def test_a_receipt_outlives_a_publish_that_failed(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    async with login(pair.first, 2, {"1": None}) as here, login(pair.second, 3, {"1": None}) as there:
        await post_many(pair.first, 1, ["read this"])
        (message,) = await there.messages(1)
        client = client_of(pair.server)
        client.client_pause(3000, all=False)  # writes alone: the other node's links stay up
        client.close()
        assert (await here.request("read", conversation_id=1, id=message["id"]))["event"] == "ok"
        receipt = await there.expect("receipt", patience=10)
        assert (receipt["user_id"], receipt["read"]) == (2, message["id"])


async def test_removal_works_on_the_other_nodes_live_connections(pair: Pair) -> None:
    await wait_until_ready(pair.first, "ok")
    await wait_until_ready(pair.second, "ok")
    async with login(pair.second, 2, {"1": None}) as there:
        await trio.to_thread.run_sync(pair.first.request, "DELETE", "/api/ws/conversations/1/members/2")
        ended = await there.expect("unsubscribed", patience=1.0)
        assert (ended["conversation_id"], ended["code"]) == (1, "not_found")
        await post_many(pair.first, 1, ["unheard"])
        await there.silence()


def insert_as_a_dead_node(connection: Any, conversation: int, seq: int, *, told: bool = False) -> None:
    """One committed message that no node of ours has heard of. It is in the outbox, unless Redis was told."""
    payload = json.dumps(
        {"event": "message", "conversation_id": conversation, "content": "from the dead", "seq": seq}
    ).encode()
    statements = [
        "INSERT INTO chat_conversations (id, updated_at) VALUES (:c, now()) ON CONFLICT DO NOTHING",
        "UPDATE chat_conversations SET last_seq = :s WHERE id = :c",
        "INSERT INTO chat_messages (id, chat_conversation_id, user_id, type, content, created_at, updated_at,"
        " seq, request_hash) VALUES (1000, :c, 1, 'text', 'from the dead', now(), now(), :s, '')",
        "INSERT INTO chat_changes (conversation_id, seq, kind, message_id) VALUES (:c, :s, 'created', 1000)",
        "INSERT INTO chat_outbox (node, created_at, payloads) VALUES ('dead', now() - interval '1 minute', :p)",
    ]
    for statement in statements[:-1] if told else statements:
        connection.execute(text(statement), {"c": conversation, "s": seq, "p": payload})


def test_signals_that_wait_for_redis_are_bounded_in_bytes() -> None:
    """A custom event has 64 KiB: ten thousand of them would be 640 MB."""
    waiting = WaitingSignals()
    signals = [number.to_bytes(4, "big") * 16_000 for number in range(1000)]
    for one in signals:
        waiting.append(one)
    kept = []
    while taken := waiting.first():
        assert sum(map(len, taken)) <= 256 * 1024
        waiting.append(b"comes meanwhile") if not kept else None
        waiting.done(taken)
        kept += taken
    assert sum(map(len, kept)) <= 8 * 1024 * 1024 + 15
    assert kept[:-1] == signals[-len(kept) + 1 :]
    for number in range(20_000):
        waiting.append(b"%d" % number)
    assert len(waiting) == 10_000


def test_a_read_of_the_stream_is_bounded_in_bytes_by_what_came_before() -> None:
    small, large = [(b"1-0", {b"m": b"x" * 200})], [(b"1-0", {b"m": b"x" * 50_000})]
    assert (fitting_count(small), fitting_count(large)) == (1000, 41)
    assert fitting_count([(b"1-0", {b"m": b"x" * 5_000_000})]) == 1
