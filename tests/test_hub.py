"""The native protocol over real sockets: authenticate, subscribe, send, edit, delete, page, resume."""

from __future__ import annotations

import sqlite3

import trio

from tests.client import connect, login
from tests.daemon import Daemon


async def test_a_client_may_send_null_for_what_it_leaves_out(daemon: Daemon, conversation: int) -> None:
    place = {"conversation_id": conversation}
    async with login(daemon, 7) as client:
        answer = await client.request("subscribe", **place, presence=None, after=None, mark=None, epoch=None)
        assert "online" not in answer
        nothing = dict.fromkeys(("type", "meta", "client_id", "reply_to"))
        sent = await client.request("send", **place, content="x", **nothing)
        (told,) = await client.messages(1)
        assert (told["type"], told["meta"]) == ("text", None)
        page = await client.request("history", **place, before=None, after=None, limit=None)
        assert len(page["messages"]) == 1
        edited = await client.request("edit", **place, id=sent["id"], content=None, meta={"a": 1})
        assert edited["event"] == "ok"
        path = f"/api/ws/messages/{sent['id']}"
        assert daemon.request("PATCH", path, {"content": None, "meta": {"b": 1}}).status == 200
        for _ in range(2):
            (told,) = await client.messages(1)
            assert told["content"] == "x"
        refused = await client.request("edit", **place, id=sent["id"], content=None)
        assert (refused["code"], refused["field"]) == ("bad_request", "content")
        assert daemon.request("POST", "/api/ws/users/7/disconnect", {"reconnect": None}).status == 200
        assert (await client.closed())[0] == 4503


async def test_a_posted_message_reaches_everybody_in_the_room(daemon: Daemon, conversation: int) -> None:
    async with login(daemon, 1, {conversation: None}) as ada, login(daemon, 2, {conversation: None}) as grace:
        stored = await trio.to_thread.run_sync(daemon.post, conversation, 5, "Hello")
        for client in (ada, grace):
            message = await client.expect("message")
            assert len(message["mark"]) == 8
            assert message == {
                "event": "message",
                "conversation_id": conversation,
                "id": stored["id"],
                "user_id": 5,
                "type": "text",
                "content": "Hello",
                "meta": None,
                "created_at": stored["created_at"],
                "seq": 1,
                "client_id": None,
                "mark": message["mark"],
            }


async def test_hello_says_what_a_client_must_know(daemon: Daemon) -> None:
    async with connect(daemon.ws_url, subprotocols=["chatd.v1"]) as client:
        hello = await client.next()
        assert client.ws.subprotocol == "chatd.v1"
        assert (hello["event"], hello["protocol"]) == ("hello", "chatd.v1")
        assert hello["limits"] == {"frame": 65536, "content": 8000, "rooms": 200, "history": 100}
        assert hello["reconnect"] == {"min": 500, "max": 20000, "window": 1000}


async def test_a_send_is_acknowledged_and_echoed_with_its_client_id(daemon: Daemon, conversation: int) -> None:
    async with login(daemon, 1, {conversation: None}) as ada:
        ok = await ada.request(
            "send", conversation_id=conversation, content="hi", client_id="c-1", meta={"a": [1]}
        )
        echo = await ada.expect("message")
        assert ok["event"] == "ok"
        assert {"duplicate"}.isdisjoint(ok)
        assert (echo["id"], echo["seq"], echo["client_id"], echo["meta"]) == (
            ok["id"],
            ok["seq"],
            "c-1",
            {"a": [1]},
        )

        again = await ada.request(
            "send", conversation_id=conversation, content="hi", client_id="c-1", meta={"a": [1]}
        )
        assert (again["id"], again["seq"], again["duplicate"]) == (ok["id"], ok["seq"], True)
        other = await ada.request("send", conversation_id=conversation, content="ho", client_id="c-1")
        assert (other["event"], other["code"]) == ("error", "conflict")
        await ada.silence()


async def test_sends_are_committed_in_the_order_they_came(daemon: Daemon, conversation: int) -> None:
    async with login(daemon, 1, {conversation: None}) as ada:
        for number in range(300):
            await ada.send("send", conversation_id=conversation, content=str(number))
        messages = await ada.messages(300)
        assert [m["content"] for m in messages] == [str(n) for n in range(300)]
        assert [m["seq"] for m in messages] == list(range(1, 301))


async def test_edit_and_delete_are_changes_of_their_own(daemon: Daemon, conversation: int) -> None:
    async with login(daemon, 1, {conversation: None}) as ada, login(daemon, 2, {conversation: None}) as grace:
        sent = await ada.request("send", conversation_id=conversation, content="helo", meta={"k": 1})
        await ada.request("edit", conversation_id=conversation, id=sent["id"], content="hello")
        await ada.request("delete", conversation_id=conversation, id=sent["id"])
        created, updated, deleted = await grace.messages(3)
        assert (updated["event"], updated["id"], updated["seq"], updated["content"], updated["meta"]) == (
            "message.updated", sent["id"], 2, "hello", {"k": 1}
        )  # fmt: skip
        assert updated["edited_at"] > created["created_at"]
        assert (deleted["event"], deleted["seq"], deleted["content"], deleted["meta"]) == (
            "message.deleted", 3, None, None
        )  # fmt: skip
        assert deleted["deleted_at"]
        gone = await ada.request("edit", conversation_id=conversation, id=sent["id"], content="x")
        assert gone["code"] == "not_found"


async def test_only_the_author_may_change_a_message(daemon: Daemon, conversation: int) -> None:
    async with login(daemon, 1, {conversation: None}) as ada, login(daemon, 2, {conversation: None}) as grace:
        sent = await ada.request("send", conversation_id=conversation, content="mine")
        refused = await grace.request("edit", conversation_id=conversation, id=sent["id"], content="yours")
        assert refused["code"] == "forbidden"
        elsewhere = await ada.request("delete", conversation_id=conversation + 1, id=sent["id"])
        assert elsewhere["code"] == "not_found"


async def test_history_pages_by_id_in_both_directions(daemon: Daemon, conversation: int) -> None:
    ids = [(await trio.to_thread.run_sync(daemon.post, conversation, 1, f"m{n}"))["id"] for n in range(7)]
    async with login(daemon, 1) as ada:
        newest = await ada.request("history", conversation_id=conversation, limit=3)
        assert ([m["id"] for m in newest["messages"]], newest["has_more"]) == (ids[4:], True)
        older = await ada.request("history", conversation_id=conversation, before=ids[4], limit=4)
        assert ([m["id"] for m in older["messages"]], older["has_more"]) == (ids[:4], False)
        newer = await ada.request("history", conversation_id=conversation, after=ids[1], limit=2)
        assert ([m["id"] for m in newer["messages"]], newer["has_more"]) == (ids[2:4], True)
        both = await ada.request("history", conversation_id=conversation, after=1, before=2)
        assert (both["code"], both["field"]) == ("bad_request", "after")


async def test_unsubscribe_ends_delivery(daemon: Daemon, conversation: int) -> None:
    async with login(daemon, 1, {conversation: None}) as ada:
        assert (await ada.request("unsubscribe", conversation_id=conversation))["event"] == "ok"
        await trio.to_thread.run_sync(daemon.post, conversation, 2, "unheard")
        assert (await ada.request("ping"))["event"] == "pong"
        await ada.silence()


async def test_subscribe_then_unsubscribe_in_one_breath_leaves_the_room(
    daemon: Daemon, conversation: int
) -> None:
    async with login(daemon, 1) as ada:
        await ada.send("subscribe", ref="s", conversation_id=conversation)
        await ada.send("unsubscribe", ref="u", conversation_id=conversation)
        assert (await ada.expect("ok"))["ref"] == "u"
        await trio.to_thread.run_sync(daemon.post, conversation, 2, "unheard")
        answer = ada.received.popleft() if ada.received else await ada.next()
        assert (answer["event"], answer["ref"]) in (("error", "s"), ("subscribed", "s"))
        await ada.silence()


async def test_a_room_that_does_not_exist_yet_can_be_entered(daemon: Daemon, conversation: int) -> None:
    async with login(daemon, 1) as ada:
        subscribed = await ada.request("subscribe", conversation_id=conversation, after=0)
        assert (subscribed["seq"], subscribed["recovered"], subscribed["changes"]) == (0, True, [])
        await trio.to_thread.run_sync(daemon.post, conversation, 2, "first")
        assert (await ada.expect("message"))["seq"] == 1


async def test_errors_carry_code_field_and_ref(daemon: Daemon, conversation: int) -> None:
    async with login(daemon, 1) as ada:
        unknown = await ada.request("dance")
        assert (unknown["event"], unknown["code"]) == ("error", "unknown_event")
        missing = await ada.request("send", conversation_id=conversation)
        assert (missing["code"], missing["field"]) == ("bad_request", "content")
        for bad in (0, -1, 2**53, "1", 1.5, True, None):
            wrong = await ada.request("send", conversation_id=bad, content="x")
            assert (wrong["code"], wrong["field"]) == ("bad_request", "conversation_id"), bad
        long = await ada.request("send", conversation_id=conversation, content="x" * 8001)
        assert (long["code"], long["field"]) == ("too_large", "content")
        meta = await ada.request("send", conversation_id=conversation, content="x", meta={"k": "v" * 9000})
        assert (meta["code"], meta["field"]) == ("too_large", "meta")
        null = await ada.request("send", conversation_id=conversation, content="x\0y")
        assert (null["code"], null["field"]) == ("bad_request", "content")
        reply = await ada.request("send", conversation_id=conversation, content="x", reply_to=10**9)
        assert (reply["code"], reply["field"]) == ("bad_request", "reply_to")
        await ada.ws.send_message('{"event":"send","ref":"half","conversation_id":1,"content":"\\ud83d"}')
        await ada.ws.send_message('{"event":"ping","ref":"\\ud800"}')
        half = await ada.expect("error")  # of an emoji: wrong, but nobody is sent away for it
        assert (half["ref"], half["code"]) == ("half", "bad_request")
        assert "ref" not in await ada.expect("error", code="bad_request")
        assert (await ada.request("send", conversation_id=conversation, content="fine"))["event"] == "ok"


async def test_a_flat_client_hears_messages_and_nothing_else(daemons, conversation: int) -> None:  # type: ignore[no-untyped-def]
    daemon = await trio.to_thread.run_sync(lambda: daemons(hub__allow_query_token="true"))
    token = daemon.token_for(1)
    async with connect(f"{daemon.ws_url}?token={token}&conversation_id={conversation}") as flat:
        async with login(daemon, 2, {conversation: None}) as ada:
            await trio.testing.wait_all_tasks_blocked(0.2)
            sent = await ada.request("send", conversation_id=conversation, content="one")
            await ada.request("edit", conversation_id=conversation, id=sent["id"], content="uno")
            await ada.request("send", conversation_id=conversation, content="two")
        assert [(e["event"], e["content"]) for e in (await flat.next(), await flat.next())] == [
            ("message", "one"),
            ("message", "two"),
        ]
        with trio.move_on_after(0.3):
            raise AssertionError(await flat.next())


async def test_a_token_in_the_url_is_refused_unless_allowed(daemon: Daemon) -> None:
    async with connect(f"{daemon.ws_url}?token=x&conversation_id=1") as client:
        assert (await client.closed())[0] == 4500


async def test_an_answer_that_comes_late_goes_to_nobody_else(daemon: Daemon, conversation: int) -> None:
    """A client vanishes while its command waits for the database; the next ones get its descriptor."""
    daemon.post(conversation, 5, "the room is there")
    with sqlite3.connect(daemon.directory / "chatd.db", isolation_level=None) as lock:
        async with login(daemon, 4711, {conversation: None}) as gone:
            lock.execute("BEGIN IMMEDIATE")
            await gone.send("send", ref="gone", conversation_id=conversation, content="late")
            await gone.request("ping")  # the writer has the command now
            await gone.ws._stream.aclose()  # without a goodbye
            with trio.fail_after(5):
                while not any("4711" in line and "closed" in line for line in daemon.log.splitlines()):
                    await trio.sleep(0.01)
        async with login(daemon, 1) as first, login(daemon, 2) as second, login(daemon, 3) as third:
            lock.execute("ROLLBACK")
            await trio.to_thread.run_sync(daemon.post, conversation, 5, "committed after it")
            for client in (first, second, third):
                await client.silence(0.1)
    lock.close()
