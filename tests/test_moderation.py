"""Reactions, moderators, members sent away, users revoked: each on live connections, on all nodes."""

from __future__ import annotations

import time
from typing import Any

import pytest
import trio

from tests.client import Client, connect, login
from tests.conftest import Daemons, Deployment
from tests.daemon import Answer, Daemon

ADA, BOB, CYD = 31, 32, 33


async def ask(daemon: Daemon, method: str, path: str, body: Any = None) -> Answer:
    return await trio.to_thread.run_sync(daemon.request, method, f"/api/ws{path}", body)


def room_of(conversation: int) -> dict[str, None]:
    return {str(conversation): None}


# Reactions.


async def test_a_reaction_is_a_change_of_its_message(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    message = deployment.here.post(conversation, ADA, "hello")
    place = {"conversation_id": conversation, "id": message["id"]}
    async with (
        login(deployment.here, ADA, room_of(conversation)) as ada,
        login(deployment.there, BOB, room_of(conversation)) as bob,
    ):
        assert await bob.request("react", **place, emoji="👍", on=True) | {"ref": 0} == {
            "event": "ok", "ref": 0, "id": message["id"], "seq": 2,
        }  # fmt: skip
        (told,) = await ada.messages(1)
        assert (told["event"], told["seq"], told["reactions"]) == ("message.updated", 2, {"👍": [BOB]})
        assert "edited_at" not in told
        await bob.messages(1)
        # Said twice it is no second change.
        assert (await bob.request("react", **place, emoji="👍", on=True))["seq"] == 2
        assert (await ada.request("react", **place, emoji="👍", on=True))["seq"] == 3
        (told,) = await bob.messages(1)
        assert told["reactions"] == {"👍": [BOB, ADA]}
        assert (await bob.request("react", **place, emoji="👍", on=False))["seq"] == 4
        page = (await bob.request("history", conversation_id=conversation))["messages"]
        assert page[0]["reactions"] == {"👍": [ADA]}
        assert (await ada.request("react", **place, emoji="👍", on=False))["seq"] == 5
        page = (await bob.request("history", conversation_id=conversation))["messages"]
        assert "reactions" not in page[0]
    # Who was away gets the message as it is now, once for each change.
    async with login(deployment.there, BOB, {str(conversation): 1}) as bob:
        changes = bob.ready["rooms"][str(conversation)]["changes"]
        assert [(change["seq"], change["event"]) for change in changes] == [
            (seq, "message.updated") for seq in (2, 3, 4, 5)
        ]


async def test_many_reactions_are_counted_and_the_first_named(
    deployment: Deployment, conversation: int
) -> None:
    users = list(range(1001, 1026))
    deployment.add(conversation, ADA, *users)
    id = deployment.here.post(conversation, ADA, "popular")["id"]
    clients: list[Client] = []

    async def react(user: int, on: bool) -> None:
        async with login(deployment.there, user) as client:
            clients.append(client)
            answer = await client.request("react", conversation_id=conversation, id=id, emoji="🎉", on=on)
            assert answer["event"] == "ok"

    for user in users:
        await react(user, True)
    path = f"/api/ws/conversations/{conversation}/messages"
    (message,) = deployment.here.get(path).json["messages"]
    assert (message["reactions"], message["reaction_counts"]) == ({"🎉": users[:20]}, {"🎉": 25})
    await react(users[3], False)  # one of the named has gone: the next is named
    (message,) = deployment.here.get(path).json["messages"]
    named = [user for user in users if user != users[3]][:20]
    assert (message["reactions"], message["reaction_counts"]) == ({"🎉": named}, {"🎉": 24})


async def test_what_cannot_be_reacted_to(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    id = deployment.here.post(conversation, ADA, "hello")["id"]
    place = {"conversation_id": conversation, "id": id, "on": True}
    async with login(deployment.there, BOB) as bob, login(deployment.here, CYD) as cyd:
        assert (await cyd.request("react", **place, emoji="👍"))["code"] == "not_found"
        assert (await bob.request("react", **place, emoji=""))["field"] == "emoji"
        assert (await bob.request("react", **place, emoji="x" * 33))["field"] == "emoji"
        assert (await bob.request("react", **place, emoji="a\0"))["field"] == "emoji"
        for number in range(20):
            assert (await bob.request("react", **place, emoji=f"e{number}"))["event"] == "ok"
        refused = await bob.request("react", **place, emoji="one more")
        assert (refused["code"], refused["field"]) == ("limit_exceeded", "emoji")
        assert (await ask(deployment.here, "DELETE", f"/messages/{id}")).status == 200
        assert (await bob.request("react", **place, emoji="👍"))["code"] == "not_found"
    (message,) = deployment.here.get(f"/api/ws/conversations/{conversation}/messages").json["messages"]
    assert (message["content"], message.get("reactions")) == (None, None)


# Moderators.


async def test_a_moderator_changes_what_others_wrote(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    deployment.add(conversation, CYD, role="moderator")
    id = deployment.here.post(conversation, ADA, "rude")["id"]
    place = {"conversation_id": conversation, "id": id}
    async with login(deployment.there, BOB) as bob, login(deployment.there, CYD) as cyd:
        assert (await bob.request("edit", **place, content="mine"))["code"] == "forbidden"
        assert (await bob.request("delete", **place))["code"] == "forbidden"
        assert (await cyd.request("edit", **place, content="polite"))["seq"] == 2
        deployment.add(conversation, CYD, role=None)
        assert (await cyd.request("delete", **place))["code"] == "forbidden"
        deployment.add(conversation, CYD, role="moderator")
        assert (await cyd.request("delete", **place))["seq"] == 3


async def test_the_muted_read_and_do_not_write(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA)
    deployment.add(conversation, BOB, muted_until="2999-01-01T00:00:00Z")
    id = deployment.here.post(conversation, ADA, "hello")["id"]
    async with login(deployment.there, BOB, room_of(conversation)) as bob:
        for event, fields in (("send", {"content": "x"}), ("react", {"id": id, "emoji": "👍", "on": True})):
            refused = await bob.request(event, conversation_id=conversation, **fields)
            assert (refused["code"], refused["until"]) == ("muted", "2999-01-01T00:00:00.000000Z")
        assert (await bob.request("read", conversation_id=conversation, id=id))["event"] == "ok"
        deployment.add(conversation, BOB, muted_until=None)
        assert (await bob.request("send", conversation_id=conversation, content="x"))["event"] == "ok"


async def test_a_removed_and_a_banned_member_hears_nothing_more(
    deployment: Deployment, conversation: int
) -> None:
    for query in ("", "?ban=true"):
        deployment.add(conversation, ADA, BOB)
        async with (
            login(deployment.here, ADA, room_of(conversation)) as ada,
            login(deployment.there, BOB, room_of(conversation)) as bob,
        ):
            began = time.monotonic()
            path = f"/conversations/{conversation}/members/{BOB}{query}"
            assert (await ask(deployment.here, "DELETE", path)).json == {"status": "ok"}
            assert (await bob.expect("unsubscribed"))["code"] == "not_found"
            assert time.monotonic() - began < 1
            bob.received.clear()  # that bob was added may have been told before
            assert (await ada.expect("member"))["change"] == "removed"
            await trio.to_thread.run_sync(deployment.here.post, conversation, ADA, "secret")
            await ada.messages(1)
            await bob.silence()
            for event in ("subscribe", "history"):
                assert (await bob.request(event, conversation_id=conversation))["code"] == "not_found"
    # Posting for somebody who was banned is refused nothing, but makes no member of them.
    deployment.here.post(conversation, BOB, "by the backend")
    async with login(deployment.there, BOB) as bob:
        assert (await bob.request("subscribe", conversation_id=conversation))["code"] == "not_found"
        deployment.add(conversation, BOB)
        assert (await bob.request("subscribe", conversation_id=conversation))["event"] == "subscribed"


# Users.


async def test_a_user_is_sent_away_from_all_nodes(deployment: Deployment, conversation: int) -> None:
    for reconnect, code in ((True, 4003), (False, 4503)):
        async with login(deployment.here, BOB) as one, login(deployment.there, BOB) as other:
            with trio.fail_after(5):
                while deployment.here.get(f"/api/ws/users/{BOB}").json["connections"] != 2:
                    await trio.sleep(0.02)
            answer = await ask(deployment.here, "POST", f"/users/{BOB}/disconnect", {"reconnect": reconnect})
            assert answer.json == {"status": "ok", "closed": 2}
            for client in (one, other):
                assert (await client.closed())[0] == code
    assert (await ask(deployment.here, "POST", "/users/987654/disconnect")).json["closed"] == 0


async def test_revoked_tokens_are_void_at_once_and_for_good(deployment: Deployment, conversation: int) -> None:
    user = 34
    old = deployment.there.token_for(user)
    async with login(deployment.there, user, token=old) as client, login(deployment.here, ADA) as ada:
        began = time.monotonic()
        assert (await ask(deployment.here, "POST", f"/users/{user}/revoke")).json == {"status": "ok"}
        assert (await client.closed())[0] == 4503
        assert time.monotonic() - began < 1
        await ada.silence()
    async with connect(deployment.there.ws_url) as client:
        await client.next()
        assert (await client.request("auth", token=old))["code"] == "unauthorized"
        assert (await client.closed())[0] == 4503
    async with login(deployment.there, user) as client:  # with a new one, of the same second
        await client.request("ping")
        # Tokens of before a moment in the past: this one is younger.
        assert (await ask(deployment.here, "POST", f"/users/{user}/revoke", {"before": 1.5e9})).status == 200
        await client.silence()
        early = {"before": "2030-13-01"}
        refused = await ask(deployment.here, "POST", f"/users/{user}/revoke", early)
        assert (refused.status, list(refused.json["errors"])) == (422, ["before"])


async def test_a_banned_user_is_kept_out_of_everything(deployment: Deployment, conversation: int) -> None:
    user = 35
    async with login(deployment.there, user) as client:
        assert (
            await ask(deployment.here, "PUT", f"/users/{user}/ban", {"until": "2999-01-01T00:00:00Z"})
        ).status == 200
        assert (await client.closed())[0] == 4503
    async with connect(deployment.here.ws_url) as client:
        await client.next()
        token = await trio.to_thread.run_sync(deployment.here.token_for, user)
        refused = await client.request("auth", token=token)
        assert (refused["code"], refused["until"]) == ("unauthorized", "2999-01-01T00:00:00.000000Z")
    assert (await ask(deployment.here, "DELETE", f"/users/{user}/ban")).status == 200
    async with login(deployment.there, user) as client:
        await client.request("ping")


# An application's own events.


async def test_an_event_of_the_application(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    path = f"/conversations/{conversation}/events"
    async with (
        login(deployment.here, ADA, room_of(conversation)) as ada,
        login(deployment.there, BOB, room_of(conversation)) as bob,
    ):
        answer = await ask(deployment.here, "POST", path, {"event": "call.started", "data": {"room": "x"}})
        assert answer.json == {"status": "ok"}
        told = {"event": "call.started", "conversation_id": conversation, "data": {"room": "x"}}
        assert await ada.next() == told
        assert await bob.next() == told
        await ask(deployment.here, "POST", path, {"event": "hint", "data": [1], "user_ids": [BOB]})
        assert (await bob.next())["data"] == [1]
        await ada.silence()
    for body, field in (
        ({"event": "message"}, "event"),
        ({"event": ""}, "event"),
        ({"data": 1}, "event"),
        ({"event": "x", "user_ids": [0]}, "user_ids"),
    ):
        refused = await ask(deployment.here, "POST", path, body)
        assert (refused.status, list(refused.json["errors"])) == (422, [field])
    refused = await ask(deployment.here, "POST", path, {"event": "x", "data": "y" * 70_000})
    assert (refused.status, refused.json["code"]) == (422, "too_large")


async def test_clients_send_messages_of_some_types_alone(daemons: Daemons) -> None:
    """Nobody forges what looks like a word of the system; a backend sends what it likes."""
    daemon = daemons()
    async with login(daemon, 7, {"1": None}) as client:
        for name in ("system", "System", "order", "text "):
            refused = await client.request("send", conversation_id=1, content="x", type=name, meta={"a": 1})
            assert (refused["code"], refused["field"]) == ("forbidden", "type"), name
        for name in ("text", "image", "video", "audio", "file"):
            assert (await client.request("send", conversation_id=1, content="x", type=name))["event"] == "ok"
        daemon.post(1, 8, "x", type="system")
        assert [one["type"] for one in await client.messages(6)][-1] == "system"


@pytest.mark.parametrize(
    ("types", "allowed"), [("poll,text", {"poll", "text"}), ("*", {"poll", "text", "file"})]
)
async def test_which_types_clients_send_is_set(daemons: Daemons, types: str, allowed: set[str]) -> None:
    daemon = daemons(rooms__client_types=types)
    async with login(daemon, 7, {"1": None}) as client:
        for name in ("poll", "text", "file"):
            answer = await client.request("send", conversation_id=1, content="x", type=name)
            assert (answer["event"] == "ok") is (name in allowed), name


def test_a_role_that_is_misspelt_is_refused(daemons: Daemons) -> None:
    """It would give no right, and nobody would be told."""
    daemon, path = daemons(), "/api/ws/conversations/1/members/7"
    for role in ("Moderator", "moderater", " moderator", "MODERATOR", "moderators"):
        answer = daemon.request("PUT", path, {"role": role})
        assert answer.status == 422, role
        assert "did you mean 'moderator'?" in answer.json["errors"]["role"][0]
    for role in ("moderator", None, "guest", "admin", "operator", "model"):
        assert daemon.request("PUT", path, {"role": role}).status == 200, role
