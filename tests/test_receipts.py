"""Receipts: cursors that only go ahead, told to the room, counted into `unread`, and gathered by connection."""

from __future__ import annotations

import time
from typing import Any

import trio

from tests.client import Client, login
from tests.conftest import Daemons, Deployment

ADA, BOB, CYD = 11, 12, 13


async def post(deployment: Deployment, room: int, user: int, *contents: str) -> list[int]:
    return [
        (await trio.to_thread.run_sync(deployment.here.post, room, user, content))["id"] for content in contents
    ]


async def test_what_is_read_is_told_to_the_room_and_kept(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    one, two, three = await post(deployment, conversation, ADA, "1", "2", "3")
    room = {str(conversation): None}
    async with login(deployment.here, ADA, room) as ada, login(deployment.there, BOB, room) as bob:
        assert bob.ready["rooms"][str(conversation)]["unread"] == 3
        assert (await bob.request("delivered", conversation_id=conversation, id=three))["event"] == "ok"
        told = await ada.expect("receipt")
        assert told == {"event": "receipt", "conversation_id": conversation, "user_id": BOB, "delivered": three}
        assert (await bob.request("read", conversation_id=conversation, id=two))["event"] == "ok"
        told = await ada.expect("receipt")
        assert told == {"event": "receipt", "conversation_id": conversation, "user_id": BOB, "read": two}
        # Back it never goes, and then nobody is told.
        assert (await bob.request("read", conversation_id=conversation, id=one))["event"] == "ok"
        await ada.silence()
    async with login(deployment.here, BOB, room) as bob:
        state = bob.ready["rooms"][str(conversation)]
        assert (state["unread"], state["receipts"]) == (1, [{"user_id": BOB, "read": two, "delivered": three}])


async def test_reading_is_receiving_and_ends_at_the_newest(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    (newest,) = await post(deployment, conversation, ADA, "only")
    room = {str(conversation): None}
    async with login(deployment.here, ADA, room) as ada, login(deployment.there, BOB, room) as bob:
        await bob.send("read", conversation_id=conversation, id=2**53 - 1)
        told = await ada.expect("receipt")
        assert (told["read"], told["delivered"]) == (newest, newest)


async def test_own_and_deleted_messages_are_not_unread(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    ids = await post(deployment, conversation, ADA, "1", "2", "3")
    await post(deployment, conversation, BOB, "mine")
    await trio.to_thread.run_sync(deployment.here.request, "DELETE", f"/api/ws/messages/{ids[1]}")
    answer = deployment.there.get(f"/api/ws/users/{BOB}").json
    mine = next(one for one in answer["conversations"] if one["conversation_id"] == conversation)
    assert mine == {"conversation_id": conversation, "seq": 5, "unread": 2}


async def test_unread_is_counted_up_to_a_thousand(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    many = [{"conversation_id": conversation, "sender_id": ADA, "content": str(n)} for n in range(700)]
    for _ in range(2):
        answer = deployment.here.request("POST", "/api/ws/messages/batch", {"messages": many})
        assert answer.status == 200
    newest = answer.json["results"][-1]["id"]
    room = {str(conversation): None}
    async with login(deployment.there, BOB, room) as bob:
        assert bob.ready["rooms"][str(conversation)]["unread"] == 1000
        assert (await bob.request("read", conversation_id=conversation, id=newest - 7))["event"] == "ok"
        answer = await bob.request("subscribe", conversation_id=conversation)
        assert answer["unread"] == 7


async def test_who_may_not_look_has_no_cursor(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    (newest,) = await post(deployment, conversation, ADA, "1")
    path = f"/api/ws/conversations/{conversation}"
    async with login(deployment.there, CYD) as cyd, login(deployment.there, BOB) as bob:
        refused = await cyd.request("read", conversation_id=conversation, id=newest)
        assert (refused["code"], refused["field"]) == ("not_found", "conversation_id")
        await trio.to_thread.run_sync(deployment.here.request, "DELETE", f"{path}/members/{BOB}")
        refused = await bob.request("read", conversation_id=conversation, id=newest)
        assert refused["code"] == "not_found"
        refused = await bob.request("read", conversation_id=conversation, id=0)
        assert (refused["code"], refused["field"]) == ("bad_request", "id")
    assert deployment.here.get(path).json["receipts"] == []


async def test_a_flood_of_receipts_is_gathered(deployment: Deployment, conversation: int) -> None:
    """Of thirty in a row the room hears a few, and the last of them is the last one sent."""
    deployment.add(conversation, ADA, BOB)
    ids = await post(deployment, conversation, ADA, *map(str, range(30)))
    room = {str(conversation): None}
    async with login(deployment.here, ADA, room) as ada, login(deployment.there, BOB, room) as bob:
        started = time.monotonic()
        for id in ids:
            await bob.send("read", conversation_id=conversation, id=id)
        told: list[dict[str, Any]] = []
        while not told or told[-1]["read"] != ids[-1]:
            told.append(await ada.expect("receipt"))
        assert len(told) <= 2 + 3 * (time.monotonic() - started)


async def test_the_last_receipt_of_a_connection_counts(deployment: Deployment, conversation: int) -> None:
    """It waits for its third of a second when the connection ends."""
    deployment.add(conversation, ADA, BOB)
    one, two = await post(deployment, conversation, ADA, "1", "2")
    room = {str(conversation): None}
    async with login(deployment.here, ADA, room) as ada:
        async with login(deployment.there, BOB, room) as bob:
            await bob.request("read", conversation_id=conversation, id=one)
            await bob.send("read", conversation_id=conversation, id=two)
        assert (await ada.expect("receipt", read=two))["user_id"] == BOB


async def test_each_ref_is_answered_once(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA)
    (newest,) = await post(deployment, conversation, ADA, "1")
    async with login(deployment.here, ADA) as ada:
        for ref in range(100, 105):
            await ada.send("read", ref=ref, conversation_id=conversation, id=newest)
        refs = [(await ada.expect("ok"))["ref"] for _ in range(5)]
        assert refs == list(range(100, 105))
        await ada.silence()


async def test_who_has_a_message_and_who_needs_a_push(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB, CYD, 14)
    (id,) = await post(deployment, conversation, ADA, "hello")
    path = f"/api/ws/messages/{id}/delivery"
    room = {str(conversation): None}
    async with login(deployment.here, BOB, room) as bob, login(deployment.there, CYD) as cyd:
        await bob.request("read", conversation_id=conversation, id=id)
        await wait_for(deployment, path, "online", [BOB, CYD])
        answer = deployment.there.get(path).json
        assert answer == {"read": [BOB], "delivered": [BOB], "online": [BOB, CYD], "pending": [14]}
        await cyd.request("delivered", conversation_id=conversation, id=id)
    await wait_for(deployment, path, "online", [])
    answer = deployment.there.get(path).json
    assert answer == {"read": [BOB], "delivered": [BOB, CYD], "online": [], "pending": [14]}
    assert deployment.there.get("/api/ws/messages/999999999/delivery").status == 404


async def wait_for(deployment: Deployment, path: str, key: str, value: Any) -> None:
    """Presence takes a moment from node to node."""
    with trio.fail_after(5):
        while deployment.there.get(path).json[key] != value:
            await trio.sleep(0.02)


async def test_in_a_crowded_room_receipts_are_ones_own(daemons: Daemons) -> None:
    daemon = daemons(rooms__access="members", limits__members_detail=2)
    for user in (ADA, BOB, CYD):
        daemon.request("PUT", f"/api/ws/conversations/1/members/{user}")
    id = daemon.post(1, ADA, "hello")["id"]
    async with login(daemon, ADA, {"1": None}) as ada, login(daemon, BOB, {"1": None}) as bob:
        for client in (ada, bob):
            assert (await client.request("read", conversation_id=1, id=id))["event"] == "ok"
        await silence(ada)
    async with login(daemon, BOB, {"1": None}) as bob:
        assert bob.ready["rooms"]["1"]["receipts"] == [{"user_id": BOB, "read": id, "delivered": id}]
    place = daemon.get("/api/ws/conversations/1").json
    assert (len(place["members"]), place["members_count"], place["receipts"]) == (2, 3, [])


async def test_in_a_crowded_room_ones_own_devices_are_told(deployment: Deployment, conversation: int) -> None:
    """Whoever reads on the phone finds no badge on the desktop; nobody else hears of it."""
    many = range(1, 102)
    deployment.add(conversation, *many)
    (id,) = await post(deployment, conversation, 2, "hello")
    room = {str(conversation): None}
    async with (
        login(deployment.here, 1, room) as phone,
        login(deployment.there, 1, room) as desk,
        login(deployment.there, 1) as elsewhere,
        login(deployment.here, 2, room) as other,
    ):
        while deployment.here.get("/api/ws/users/1").json["connections"] != 3:
            await trio.sleep(0.02)
        assert (await phone.request("read", conversation_id=conversation, id=id))["event"] == "ok"
        told = {"event": "receipt", "conversation_id": conversation, "user_id": 1, "read": id, "delivered": id}
        for device in (phone, desk):
            assert await device.expect("receipt") == told
        for client in (elsewhere, other):
            await silence(client)


async def silence(client: Client) -> None:
    await client.request("ping")
    assert [one for one in client.received if one["event"] == "receipt"] == []
