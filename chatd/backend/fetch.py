"""HTTP calls to the backend and to key servers, with a deadline and a size limit, and not
into private networks.

chatd resolves the host name itself, checks each address, and calls an address that it has
checked. So a name server that gives another address a moment later changes nothing. chatd
follows no redirects and uses no proxies.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Mapping, Sequence
from http.cookiejar import CookieJar, DefaultCookiePolicy
from urllib.parse import urlsplit

import httpx
import structlog
import trio
from msgspec import Struct

from chatd.core.errors import CallFailed
from chatd.core.limits import TokenBucket

BODY_BYTES = 64 * 1024  # largest body of an answer
CONNECTIONS = 128  # most connections to all hosts; more than all callers together use at once

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

log = structlog.get_logger()


class Answer(Struct, frozen=True):
    status: int
    body: bytes


class Fetcher:
    """Calls URLs. The daemon has one, which keeps connections open between calls."""

    def __init__(self, private_networks: Sequence[str]) -> None:
        """Addresses in `private_networks` may be called although they are private, and with plain HTTP."""
        self._allowed = [ipaddress.ip_network(network) for network in private_networks]
        self._client: httpx.AsyncClient | None = None
        self._making = trio.Lock()
        self._refusals = TokenBucket(rate=1 / 60, burst=1, now=0)  # one log line per minute

    async def __call__(
        self,
        method: str,
        url: str,
        *,
        within: float,
        headers: Mapping[str, str] | None = None,
        content: bytes | None = None,
        whole: bool = True,
    ) -> Answer:
        """Make one call. Raises CallFailed if there is no complete answer `within` so many seconds.

        With `whole` False only the status matters: a body that is too large is cut off instead of an error.
        """
        with trio.move_on_after(within):
            try:
                return await self._fetch(method, url, dict(headers or {}), content, whole)
            except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
                # UnicodeError: the host, here or in a redirect, is not a valid name.
                reason = f"{_origin(url)} cannot be reached: {type(error).__name__}"
                raise CallFailed("unreachable", reason) from error
        raise CallFailed("timeout", f"{_origin(url)} does not answer within {within:g} s")

    async def close(self) -> None:
        if self._client is not None:
            await self._client.aclose()

    async def _fetch(
        self, method: str, url: str, headers: dict[str, str], content: bytes | None, whole: bool
    ) -> Answer:
        target = httpx.URL(url)
        address = await self._judge(target)
        headers |= {"Host": target.netloc.decode(), "Accept-Encoding": "identity"}
        client = await self._opened()
        request = client.build_request(
            method,
            target.copy_with(host=str(address)),
            headers=headers,
            content=content,
            extensions={"sni_hostname": target.host},  # the certificate must match the name, not the address
        )
        response = await client.send(request, stream=True)
        try:
            return Answer(response.status_code, await _bounded(response, whole))
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await response.aclose()

    async def _opened(self) -> httpx.AsyncClient:
        """The client, made at the first call and in a thread: reading the certificates takes 0.1 s."""
        async with self._making:
            if self._client is None:
                self._client = await trio.to_thread.run_sync(_client)
        return self._client

    async def _judge(self, url: httpx.URL) -> Address:
        """The address to call. Raises CallFailed if an address of the host may not be called."""
        port = url.port or (443 if url.scheme == "https" else 80)
        found = await trio.socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        addresses = [_unmapped(ipaddress.ip_address(str(where[0]).partition("%")[0])) for *_, where in found]
        for address in addresses:
            listed = any(address in network for network in self._allowed)
            if not listed and not address.is_global:
                self._refuse(
                    url, f"{address} is not a public address", f"add {address} to server.private_networks"
                )
            if not listed and url.scheme != "https":
                self._refuse(url, "plain HTTP would go over the internet", "write https://")
        return addresses[0]

    def _refuse(self, url: httpx.URL, reason: str, advice: str) -> None:
        if not self._refusals.take(trio.current_time()):
            log.error("call_refused", host=url.host, reason=reason, advice=advice)
        raise CallFailed("unreachable", f"{url.host} may not be called: {reason}")


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(
        trust_env=False,
        follow_redirects=False,
        timeout=None,  # `within` covers the whole call
        # Keep no cookies: one that httpx cannot send back would make every further call fail.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
    )


async def _bounded(response: httpx.Response, whole: bool) -> bytes:
    parts: list[bytes] = []
    room = BODY_BYTES
    # A `break` would leave httpx's async generators open, which nobody closes. A cancellation unwinds them.
    with trio.CancelScope() as reading:
        async for part in response.aiter_raw():
            parts.append(part)
            room -= len(part)
            if room < 0:
                reading.cancel()
    if room < 0 and whole:
        raise httpx.ReadError("the answer is too large")
    return b"".join(parts)


def _unmapped(address: Address) -> Address:
    return getattr(address, "ipv4_mapped", None) or address


def _origin(url: str) -> str:
    """The part of a URL that may be logged: the host, without path and credentials."""
    return urlsplit(url).hostname or "the backend"
