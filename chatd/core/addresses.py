"""Network addresses: whose connection it is, behind proxies too, and what counts as one address.

Whoever counts what an address does asks `counted_as` for the key. One household has a whole /64 of IPv6, so who
counted single addresses would count nothing.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Sequence

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network

HOUSEHOLD = 64  # bits of an IPv6 address that one subscriber of a provider holds


def parse(text: str) -> Address | None:
    """`192.0.2.1`, `192.0.2.1:5000`, `2001:db8::1`, `[2001:db8::1]:5000`; None for what is no address."""
    text = text.strip().strip('"')
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return None
    # A socket for both families sees IPv4 peers as ::ffff:192.0.2.1.
    return getattr(address, "ipv4_mapped", None) or address


def client_of(peer: str, forwarded_for: str, proxies: Sequence[Network]) -> str:
    """The peer's address; if the peer is a trusted proxy, the one that it forwards for, and so on.

    `forwarded_for`: all lines of X-Forwarded-For, joined with commas. What is no address in it is passed over.
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
    """The key under which connections, rates and failures of an address are counted."""
    parsed = parse(address)
    if isinstance(parsed, ipaddress.IPv6Address):
        return str(ipaddress.IPv6Network((parsed, HOUSEHOLD), strict=False))
    return str(parsed or address)
