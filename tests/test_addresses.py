"""Whose connection it is: what X-Forwarded-For says, and what counts as one address."""

from __future__ import annotations

from ipaddress import ip_network

import pytest

from chatd.core.addresses import client_of, counted_as

PROXIES = [ip_network("127.0.0.0/8"), ip_network("10.0.0.0/8"), ip_network("2001:db8:ffff::/48")]


@pytest.mark.parametrize(
    ("forwarded_for", "client"),
    [
        ("", "127.0.0.1"),
        ("203.0.113.7", "203.0.113.7"),
        ("203.0.113.7, 10.0.0.5", "203.0.113.7"),
        ("1.1.1.1, 203.0.113.7, 10.0.0.5", "203.0.113.7"),  # the first is what the client itself claims
        ("10.0.0.6, 10.0.0.5", "10.0.0.6"),
        ("203.0.113.7:5000", "203.0.113.7"),
        ("[2001:db8::7]:443", "2001:db8::7"),
        ("2001:0DB8:0:0::7, 2001:db8:ffff::1", "2001:db8::7"),
        ('"[2001:db8::7]"', "2001:db8::7"),
        ("fe80::1%eth0", "fe80::1"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("unknown", "127.0.0.1"),
        ("203.0.113.7, unknown", "203.0.113.7"),
        ("203.0.113.7, , _hidden, 10.0.0.5", "203.0.113.7"),
        ("203.0.113.7:x:y", "127.0.0.1"),
    ],
)
def test_the_client_is_the_last_that_no_proxy_is(forwarded_for: str, client: str) -> None:
    assert client_of("127.0.0.1", forwarded_for, PROXIES) == client
    assert client_of("::ffff:127.0.0.1", forwarded_for, PROXIES) == client


def test_who_is_no_proxy_speaks_for_nobody() -> None:
    assert client_of("198.51.100.1", "203.0.113.7", PROXIES) == "198.51.100.1"


def test_a_household_counts_as_one() -> None:
    assert counted_as("2001:db8:0:1::1") == counted_as("2001:db8:0:1:ffff::2") == "2001:db8:0:1::/64"
    assert counted_as("2001:db8:0:1::1") != counted_as("2001:db8:0:2::1")
    assert counted_as("192.0.2.1") == counted_as("::ffff:192.0.2.1") == "192.0.2.1"
    assert counted_as("192.0.2.1") != counted_as("192.0.2.2")
