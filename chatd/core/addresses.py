"""Network addresses: finds a client's address behind proxies, and the key under which limits count it.

Code that counts per address uses `counted_as` as the key. A household owns a whole /64 of IPv6 and can use a
new address for every connection, so a limit per single IPv6 address would stop nobody.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

HOUSEHOLD = 64  # length in bits of the IPv6 prefix that a provider usually gives to one subscriber


def parse(text: str) -> Address | None:
    """Read `192.0.2.1`, `192.0.2.1:5000`, `2001:db8::1` or `[2001:db8::1]:5000`; else return None."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # A socket that accepts both families shows an IPv4 peer as ::ffff:192.0.2.1.
    return getattr(address, "ipv4_mapped", None) or address


def client_of(peer: str, forwarded_for: str, proxies: Sequence[Network]) -> str:
    """The client's address: the nearest address, counted from the peer, that is not a trusted proxy.

    `forwarded_for` holds all lines of X-Forwarded-For, joined with commas; entries that are no address are
    skipped. It is read from the right, because a client can write anything to the left of what the proxies add.
    """
    address = parse(peer)
    if address is None:
        return peer
    for part in reversed(forwarded_for.split(",")):
        if not is_in(address, proxies):
            break
        address = parse(part) or address
    return str(address)


def is_in(address: Address | None, networks: Sequence[Network]) -> bool:
    return address is not None and any(address in network for network in networks)


def counted_as(address: str) -> str:
    """The key under which limits count an address: the /64 network of an IPv6 address, else the address."""
    parsed = parse(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((parsed, HOUSEHOLD), strict=False))
    return str(parsed or address)
