"""Faults of clients, and of the network between them and chatd."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterable
from math import inf
from pathlib import Path

import trio

from tests.faults.cluster import PING_INTERVAL, PING_TIMEOUT
from tests.faults.nemesis.field import EVERY, Field

HALF_OPEN_SOURCE = "127.0.0.2"  # where the second crowd connects from
SILENCE = PING_INTERVAL + PING_TIMEOUT + 4.0  # seconds without a byte until a client gives its connection up
LINK_RATE = 10_000  # bytes a second of a slow link
MISSED_MESSAGE = 1000  # characters of each message that the clients behind slow links have missed
MISSED_ENVELOPE = 300  # bytes of a message beside its content, about
MISSED_MOST = 180  # in each room: 256 KiB and 300 changes are always made up for
# Seconds until chatd has given up a silent link: its ping, the time for the answer, 2 for a goodbye, and some.
GIVEN_UP = PING_INTERVAL + PING_TIMEOUT + 6.0
ESTABLISHED = "01"  # in /proc/net/tcp


async def slow_clients(field: Field) -> None:
    """Half of the clients are stopped: they read nothing and answer nothing, and then everything at once."""
    os.kill(field.crowd_pid, signal.SIGSTOP)
    try:
        await trio.sleep(field.seconds)
    finally:
        os.kill(field.crowd_pid, signal.SIGCONT)


async def slow_link(field: Field) -> None:
    """Some clients come back over links of 10 KB/s and have missed so much that it takes them half the time.

    They must get in by that one connection: a link that is given up while bytes move starts from nought again.
    """
    links, seconds = field.links, max(field.seconds, 2 * (PING_INTERVAL + PING_TIMEOUT))
    messages = min(MISSED_MOST, round(seconds / 2 * LINK_RATE / (MISSED_MESSAGE + MISSED_ENVELOPE)))
    links.cut()
    await field.workload.fill(messages, MISSED_MESSAGE)
    links.rate = LINK_RATE
    links.open()
    try:
        await trio.sleep(seconds)
        field.notes.append(f"{links.opened} links, {links.passed / 1e6:.1f} MB passed")
        if links.broken:
            field.troubles.append(f"slow-link: {links.broken} links were cut although bytes moved on them")
    finally:
        links.rate = inf


async def half_open(field: Field) -> None:
    """No packet passes between chatd and half of the clients, and neither is told."""
    rules = f"ip saddr {HALF_OPEN_SOURCE} drop\nip daddr {HALF_OPEN_SOURCE} drop"
    await _nft(_table("chatd_faults", rules))
    try:
        await trio.sleep(field.seconds)
    finally:
        with trio.CancelScope(shield=True):
            await _nft("delete table inet chatd_faults")


async def dark(field: Field) -> None:
    """Links go silent, each for itself, without FIN or RST; new ones can be made at any time.

    A third comes back soon, a third never, and on a third nothing reaches the client while chatd still hears
    it. Both ends must find it out by themselves: in the end chatd holds none of those that were dark for good.
    """
    ports = _ports_of(HALF_OPEN_SOURCE)
    field.dice.shuffle(ports)
    back, never, deaf = ports[::3], ports[1::3], ports[2::3]
    field.notes.append(f"{len(back)} links came back, {len(never)} never, {len(deaf)} were dark one way")
    began = trio.current_time()
    await _nft(_dark_rules(back, never, deaf))
    try:
        await trio.sleep(PING_INTERVAL)
        await _nft("flush set inet chatd_dark back")
        # Longer than a client takes to give up: what was dark for good comes back to nobody.
        await trio.sleep(max(field.seconds, SILENCE + EVERY) - PING_INTERVAL)
        while held := {*never, *deaf} & set(_ports_of(HALF_OPEN_SOURCE, peers=True)):
            if trio.current_time() > began + GIVEN_UP:
                field.troubles.append(f"dark: chatd holds {len(held)} dark links after {GIVEN_UP:.0f} s")
                break
            await trio.sleep(EVERY)
    finally:
        with trio.CancelScope(shield=True):
            await _nft("delete table inet chatd_dark")


def _dark_rules(back: Iterable[int], never: Iterable[int], deaf: Iterable[int]) -> str:
    sets = ""
    for name, ports in (("back", back), ("never", never), ("deaf", deaf)):
        elements = f"elements = {{ {', '.join(map(str, ports))} }}" if ports else ""
        sets += f"set {name} {{ type inet_service; {elements}; }}\n"
    rules = f"""
        ip saddr {HALF_OPEN_SOURCE} tcp sport @back drop
        ip daddr {HALF_OPEN_SOURCE} tcp dport @back drop
        ip saddr {HALF_OPEN_SOURCE} tcp sport @never drop
        ip daddr {HALF_OPEN_SOURCE} tcp dport @never drop
        ip daddr {HALF_OPEN_SOURCE} tcp dport @deaf drop
    """
    return _table("chatd_dark", rules, sets)


def _table(name: str, rules: str, sets: str = "") -> str:
    chain = f"chain drop_some {{ type filter hook output priority 0\n{rules}\n}}"
    return f"table inet {name} {{\n{sets}\n{chain}\n}}"


async def _nft(commands: str) -> None:
    await trio.run_process(["nft", "-f", "-"], stdin=commands.encode())


def _ports_of(address: str, *, peers: bool = False) -> list[int]:
    """The ports of its connections, as that end sees them, or as their peers do."""
    wanted = bytes(reversed([int(part) for part in address.split(".")])).hex().upper()
    rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
    ends = [row[2 if peers else 1] for row in rows if row[3] == ESTABLISHED]
    return [int(port, 16) for host, port in (end.split(":") for end in ends) if host == wanted]
