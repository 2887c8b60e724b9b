"""Who is online and who is typing: on all nodes, without the database, and over by itself."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import trio
import trio.testing

from chatd.chat.leases import Life
from chatd.chat.presence import (
    FORGET,
    GATHER,
    HEARTBEAT,
    ROOMS,
    SEND_ALL,
    SILENT,
    SLICE,
    USERS,
    Presence,
    Transition,
)
from chatd.core.model import Present, Signal
from tests.client import connect, login
from tests.conftest import Daemons, Deployment

ADA, BOB, CYD = 21, 22, 23


# Online.


async def test_who_comes_and_goes_is_told_to_who_asked(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB, CYD)
    room = {str(conversation): None}
    async with login(deployment.here, ADA) as ada, login(deployment.here, CYD, room) as cyd:
        found = await ada.request("subscribe", conversation_id=conversation, presence=True)
        assert found["online"] == [ADA, CYD]
        async with login(deployment.there, BOB) as bob:  # whether he listens to this room or not
            came = await ada.expect("presence")
            assert (came["conversation_id"], came["user_id"], came["online"]) == (conversation, BOB, True)
            async with login(deployment.here, BOB):  # a second connection is nothing new
                await bob.request("ping")
                assert "presence" not in [one["event"] for one in ada.received]
        gone = await ada.expect("presence")
        assert (gone["user_id"], gone["online"]) == (BOB, False)
        assert gone["version"] > came["version"]
        await cyd.silence()  # did not ask


async def test_subscribed_says_who_is_there_on_the_other_node(
    deployment: Deployment, conversation: int
) -> None:
    deployment.add(conversation, ADA, BOB)
    async with login(deployment.there, BOB), login(deployment.here, ADA) as ada:
        with trio.fail_after(5):
            while True:
                found = await ada.request("subscribe", conversation_id=conversation, presence=True)
                if found["online"] == [ADA, BOB]:
                    break
                assert found["online"] == [ADA]  # told a moment ago
        answer = deployment.here.get(f"/api/ws/conversations/{conversation}").json
        assert (answer["online"], answer["online_count"]) == ([ADA, BOB], 2)
        assert deployment.here.get(f"/api/ws/users/{BOB}").json["connections"] == 1


async def test_who_is_in_a_room_without_being_a_member_counts_too(
    deployment: Deployment, conversation: int
) -> None:
    """A token opens it; then presence is being in the room, not being connected."""
    deployment.add(conversation, ADA)
    token = deployment.there.token_for(BOB, conversations=[conversation])
    async with login(deployment.here, ADA) as ada, login(deployment.there, BOB, token=token) as bob:
        found = await ada.request("subscribe", conversation_id=conversation, presence=True)
        assert found["online"] == [ADA]
        await bob.request("subscribe", conversation_id=conversation)
        assert (await ada.expect("presence", user_id=BOB))["online"] is True
        await bob.request("unsubscribe", conversation_id=conversation)
        assert (await ada.expect("presence", user_id=BOB))["online"] is False


async def test_members_that_come_and_go_change_who_is_watched(
    deployment: Deployment, conversation: int
) -> None:
    deployment.add(conversation, ADA)
    dan = 24
    async with login(deployment.here, ADA) as ada:
        await ada.request("subscribe", conversation_id=conversation, presence=True)
        async with login(deployment.there, dan):
            await trio.to_thread.run_sync(deployment.add, conversation, dan)
            await ada.expect("member", user_id=dan)
            assert (await ada.expect("presence", user_id=dan))["online"] is True
        assert (await ada.expect("presence", user_id=dan))["online"] is False
        path = f"/api/ws/conversations/{conversation}/members/{dan}"
        await trio.to_thread.run_sync(deployment.here.request, "DELETE", path)
        await ada.expect("member", user_id=dan, change="removed")
        async with login(deployment.there, dan):
            await ada.silence()


async def test_a_crowded_room_counts_and_does_not_tell(daemons: Daemons) -> None:
    daemon = daemons(rooms__access="members", limits__members_detail=2)
    for user in (ADA, BOB, CYD):
        daemon.request("PUT", f"/api/ws/conversations/1/members/{user}")
    async with login(daemon, ADA) as ada:
        found = await ada.request("subscribe", conversation_id=1, presence=True)
        assert (found.get("online"), found["online_count"]) == (None, 1)
        async with login(daemon, BOB):
            await ada.silence()
            assert (await ada.request("subscribe", conversation_id=1, presence=True))["online_count"] == 2


async def test_a_banned_user_is_never_online(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    there = deployment.there
    ban = {"until": "2100-01-01T00:00:00Z"}
    assert (await trio.to_thread.run_sync(there.request, "PUT", f"/api/ws/users/{BOB}/ban", ban)).status == 200
    try:
        async with login(deployment.here, ADA) as ada:
            await ada.request("subscribe", conversation_id=conversation, presence=True)
            async with connect(there.ws_url) as bob:
                await bob.next()
                await bob.send("auth", token=there.token_for(BOB), rooms={})
                await bob.closed()
            async with login(there, CYD):  # told after whatever was told of him
                await trio.to_thread.run_sync(deployment.add, conversation, CYD)
                assert (await ada.expect("presence"))["user_id"] == CYD
            assert not [one for one in ada.received if one["event"] == "presence" and one["user_id"] == BOB]
    finally:
        await trio.to_thread.run_sync(there.request, "DELETE", f"/api/ws/users/{BOB}/ban")


# The state machine, on a clock of its own.


class World:
    """Nodes that hear each other at once, unless told otherwise."""

    def __init__(self, *names: str) -> None:
        self.sent: list[Present] = []
        self.nodes = {name: Presence(name, self._send) for name in names}
        self.changes: dict[str, list[Transition]] = {name: [] for name in names}
        for name, node in self.nodes.items():
            node.on_change(self.changes[name].append)

    def _send(self, signal: Signal) -> None:
        assert isinstance(signal, Present)
        self.sent.append(signal)

    async def pass_on(self) -> list[Present]:
        sent, self.sent = self.sent, []
        await self.hear(sent)
        return sent

    async def hear(self, signals: Iterable[Present], *nodes: Presence) -> None:
        """By these nodes, or all."""
        for present in signals:
            for node in nodes or self.nodes.values():
                node.hear(present)
        await trio.testing.wait_all_tasks_blocked()


async def run(world: World, nursery: trio.Nursery) -> None:
    for node in world.nodes.values():
        await nursery.start(node.run)


async def test_a_late_gone_does_not_beat_a_newer_there(autojump_clock: trio.testing.MockClock) -> None:
    world = World("a", "b")
    a, b = world.nodes.values()
    async with trio.open_nursery() as nursery:
        await run(world, nursery)
        await trio.sleep(1)
        world.sent.clear()
        a.arrive(USERS, 7)
        a.leave(USERS, 7)
        await trio.sleep(1)
        late = world.sent[:]
        a.arrive(USERS, 7)
        await trio.sleep(1)
        await world.hear([*world.sent[1:], *late], b)  # the old ones come last
        assert b.has(USERS, 7)
        assert [change.present for change in world.changes["b"]] == [True]
        nursery.cancel_scope.cancel()


async def test_versions_grow_also_when_a_user_moves_between_nodes(
    autojump_clock: trio.testing.MockClock,
) -> None:
    world = World("a", "b")
    a, b = world.nodes.values()
    async with trio.open_nursery() as nursery:
        await run(world, nursery)
        for first, second in ((a, b), (b, a)) * 3:
            first.arrive(USERS, 7)
            await trio.sleep(0.1)
            await world.pass_on()
            first.leave(USERS, 7)
            second.arrive(USERS, 7)
            await trio.sleep(0.1)
            await world.pass_on()
            second.leave(USERS, 7)
            await trio.sleep(0.1)
            await world.pass_on()
        for changes in world.changes.values():
            assert [change.present for change in changes][-1] is False
            versions = [change.version for change in changes]
            assert versions == sorted(set(versions))
        nursery.cancel_scope.cancel()


async def test_what_was_lost_is_told_again(autojump_clock: trio.testing.MockClock) -> None:
    world = World("a", "b")
    a, b = world.nodes.values()
    async with trio.open_nursery() as nursery:
        await run(world, nursery)
        a.arrive(USERS, 1)
        a.arrive(USERS, 2)
        await trio.sleep(1)
        await world.pass_on()
        assert b.present(USERS) == {1, 2}
        a.leave(USERS, 1)
        a.arrive(USERS, 3)
        await trio.sleep(1)
        world.sent.clear()  # lost
        await trio.sleep(SEND_ALL)
        await world.pass_on()
        assert b.present(USERS) == {2, 3}
        nursery.cancel_scope.cancel()


async def test_a_whole_set_that_lacks_a_part_removes_nobody(autojump_clock: trio.testing.MockClock) -> None:
    world = World("a", "b")
    a, b = world.nodes.values()
    async with trio.open_nursery() as nursery:
        await run(world, nursery)
        for user in range(1, 2501):
            a.arrive(USERS, user)
        await trio.sleep(SEND_ALL + 1)
        await world.pass_on()
        assert len(b.present(USERS)) == 2500
        await trio.sleep(SEND_ALL)
        parts = [signal for signal in world.sent if signal.node == "a" and signal.whole]
        assert [signal.whole[1:] for signal in parts if signal.whole] == [(0, 3), (1, 3), (2, 3)]
        await world.hear(parts[1:], b)
        assert len(b.present(USERS)) == 2500
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("life", Life)
async def test_a_silent_node_is_forgotten_with_its_lease(
    autojump_clock: trio.testing.MockClock, life: Life
) -> None:
    """A silent one that holds its lease is cut off from Redis alone: its users are online as ever."""
    world = World("a", "b", "c")
    a, b, c = world.nodes.values()
    async with trio.open_nursery() as nursery:
        for node in (a, b):
            await nursery.start(node.run)
            node.life = lambda name: Life.HELD if name != "c" else life
        with trio.CancelScope() as its_life:
            nursery.start_soon(run_within, c, its_life)
            c.arrive(USERS, 9)
            c.arrive(ROOMS, 4)
            await trio.sleep(1)
            await world.pass_on()
        its_life.cancel()
        assert a.has(USERS, 9)
        assert b.has(USERS, 9)
        for _ in range(4):
            await trio.sleep(SILENT / 3)
            await world.pass_on()
        assert a.has(USERS, 9) is (life is not Life.OVER)
        await trio.sleep(FORGET)
        await world.pass_on()
        assert a.has(USERS, 9) is b.has(ROOMS, 4) is (life is Life.HELD)
        nursery.cancel_scope.cancel()


async def test_a_node_that_lives_says_so_when_nothing_happens(autojump_clock: trio.testing.MockClock) -> None:
    world = World("a", "b")
    a, b = world.nodes.values()
    b.life = lambda name: Life.OVER  # it is cut off from the database alone
    async with trio.open_nursery() as nursery:
        await run(world, nursery)
        a.arrive(USERS, 1)
        for _ in range(30):
            await trio.sleep(1)
            await world.pass_on()
        assert [change.present for change in world.changes["b"]] == [True]
        nursery.cancel_scope.cancel()


async def test_fifty_thousand_users_of_a_node_come_and_go_in_slices(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """What one step of a task does is bounded: each change may have to be told to many rooms."""
    world = World("a", "b")
    a, b = world.nodes.values()
    steps: list[int] = [0]

    class Steps(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            steps.append(0)

    def count(change: Transition) -> None:
        steps[-1] += 1

    b.on_change(count)
    for user in range(50_000):
        a.arrive(USERS, user)
    async with trio.open_nursery() as nursery:
        await run(world, nursery)
        await trio.sleep(1)
        trio.lowlevel.add_instrument(Steps())
        await world.pass_on()
        assert len(b.present(USERS)) == 50_000
        b.life = lambda name: Life.OVER
        await trio.sleep(SILENT + 2 * HEARTBEAT)
        assert len(b.present(USERS)) == 0
        assert (sum(steps), max(steps)) == (100_000, SLICE)
        nursery.cancel_scope.cancel()


async def run_within(node: Presence, life: trio.CancelScope) -> None:
    with trio.CancelScope() as mine:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(node.run)
            while not life.cancel_called:
                await trio.sleep(0.1)
            mine.cancel()


async def test_nothing_is_kept_of_who_has_gone(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = World("a", "b")
    a, b = world.nodes.values()
    moment = 1_000_000
    monkeypatch.setattr("chatd.chat.presence._milliseconds", lambda: moment)
    async with trio.open_nursery() as nursery:
        await run(world, nursery)
        for user in range(1, 500):
            a.arrive(USERS, user)
            a.leave(USERS, user)
        await trio.sleep(1)
        await world.pass_on()
        moment += 120_000
        for _ in range(3):
            await trio.sleep(SEND_ALL)
            await world.pass_on()
        assert (len(a._versions), len(b._versions), len(b._nodes["a"].entries)) == (0, 0, 0)
        nursery.cancel_scope.cancel()


async def test_two_that_forget_the_same_do_not_hinder_each_other(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """A whole set no longer names those who are gone, in the moment in which this node forgets them itself.

    Their versions are old at once where the other node's clock is behind.
    """
    node = Presence("a", lambda signal: None)
    users = range(1, 50_001)
    async with trio.open_nursery() as nursery:
        await nursery.start(node.run)
        node.hear(Present("b", [(USERS, user, 1, 1) for user in users]))
        node.hear(Present("b", [(USERS, user, 0, 2) for user in users]))
        await trio.testing.wait_all_tasks_blocked()
        assert len(node._nodes["b"].entries) == len(users)
        node.tell_all_soon()
        await trio.sleep(GATHER)  # both begin now
        node.hear(Present("b", [], (1, 0, 1)))
        await trio.testing.wait_all_tasks_blocked()
        assert (len(node._nodes["b"].entries), len(node.present(USERS))) == (0, 0)
        nursery.cancel_scope.cancel()


# Typing.


@pytest.mark.parametrize("deployment", ["one"], indirect=True)
async def test_typing_is_told_to_the_others_and_ends_by_itself(
    deployment: Deployment, conversation: int
) -> None:
    here = deployment.here
    deployment.add(conversation, ADA, BOB)
    room = {str(conversation): None}
    async with login(here, ADA, room) as ada, login(here, BOB, room) as bob, login(here, ADA, room) as phone:
        began = trio.current_time()
        await ada.send("typing", conversation_id=conversation, active=True)
        told = await bob.expect("typing")
        assert told == {
            "event": "typing", "conversation_id": conversation, "user_id": ADA, "active": True, "expires_in": 6,
        }  # fmt: skip
        for _ in range(5):  # within two seconds: not told again
            await ada.send("typing", conversation_id=conversation, active=True)
        told = await bob.expect("typing")
        assert (told["active"], told["expires_in"]) == (False, 0)
        assert 5.9 < trio.current_time() - began < 8
        await phone.silence(0.1)  # she knows
        await ada.silence(0.1)


async def test_typing_ends_when_it_is_said_and_when_the_typist_vanishes(
    deployment: Deployment, conversation: int
) -> None:
    deployment.add(conversation, ADA, BOB)
    room = {str(conversation): None}
    async with login(deployment.here, BOB, room) as bob:
        async with login(deployment.there, ADA, room) as ada:
            await ada.send("typing", conversation_id=conversation, active=True)
            assert (await bob.expect("typing"))["active"] is True
            await ada.send("typing", conversation_id=conversation, active=False)
            assert (await bob.expect("typing"))["active"] is False
        async with login(deployment.there, ADA, room) as ada:
            with trio.fail_after(5):  # two seconds after the last
                while not any(one["event"] == "typing" for one in bob.received):
                    await ada.send("typing", conversation_id=conversation, active=True)
                    await trio.sleep(0.1)
                    await bob.request("ping")
            assert (await bob.expect("typing"))["active"] is True
        began = trio.current_time()
        assert (await bob.expect("typing"))["active"] is False
        assert trio.current_time() - began < 2


async def test_who_is_not_in_the_room_types_into_nothing(deployment: Deployment, conversation: int) -> None:
    deployment.add(conversation, ADA, BOB)
    async with login(deployment.here, BOB, {str(conversation): None}) as bob:
        async with login(deployment.there, ADA) as ada:
            refused = await ada.request("typing", conversation_id=conversation, active=True)
            assert (refused["code"], refused["field"]) == ("not_found", "conversation_id")
        await bob.silence()
