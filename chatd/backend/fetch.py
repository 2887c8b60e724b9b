"""HTTP calls to the backend and to key servers: with a deadline, a bound, and a fence around private networks.

A URL in the configuration is looked up by us, each address it has is judged, and the call goes to the one that
was judged: what a name server says a moment later does not matter. Redirects and proxies are not followed.
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

BODY_BYTES = 64 * 1024  # of an answer
CONNECTIONS = 128  # to all of them together, above what those who call have on their way at once

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

log = structlog.get_logger()


class Answer(Struct, frozen=True):
    status: int
    body: bytes


class Fetcher:
    """Calls URLs. One for the daemon: it keeps connections open between calls."""

    def __init__(self, private_networks: Sequence[str]) -> None:
        """`private_networks` may be called although they are private, and by plain HTTP."""
        self._allowed = [ipaddress.ip_network(network) for network in private_networks]
        self._client: httpx.AsyncClient | None = None
        self._making = trio.Lock()
        self._refusals = TokenBucket(rate=1 / 60, burst=1, now=0)  # lines in the log

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
        """Raises CallFailed where there is no whole answer `within` so many seconds.

        Without `whole` the status is what counts: of a body that is too large the beginning is returned.
        """
        with trio.move_on_after(within):
            try:
                return await self._fetch(method, url, dict(headers or {}), content, whole)
            except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError) as error:
                # The last: a host, here or in a redirect, that can be no name.
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
            extensions={"sni_hostname": target.host},  # certificates are held against the name
        )
        response = await client.send(request, stream=True)
        try:
            return Answer(response.status_code, await _bounded(response, whole))
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await response.aclose()

    async def _opened(self) -> httpx.AsyncClient:
        """Made when first needed, and not by the loop: reading the certificates takes a tenth of a second."""
        async with self._making:
            if self._client is None:
                self._client = await trio.to_thread.run_sync(_client)
        return self._client

    async def _judge(self, url: httpx.URL) -> Address:
        """The address to call. Raises CallFailed for what may not be called."""
        port = url.port or (443 if url.scheme == "https" else 80)
        found = await trio.socket.getaddrinfo(url.host, port, type=socket.SOCK_STREAM)
        addresses = [_unmapped(ipaddress.ip_address(str(where[0]).partition("%")[0])) for *_, where in found]
        for address in addresses:
            listed = any(address in network for network in self._allowed)
            if not listed and not address.is_global:
                self._refuse(
                    url, f"{address} is no public address", f"add {address} to server.private_networks"
                )
            if not listed and url.scheme != "https":
                self._refuse(url, "plain HTTP goes over the internet", "write https://")
        return addresses[0]

    def _refuse(self, url: httpx.URL, reason: str, advice: str) -> None:
        if not self._refusals.take(trio.current_time()):
            log.error("call_refused", host=url.host, reason=reason, advice=advice)
        raise CallFailed("unreachable", f"{url.host} may not be called: {reason}")


def _client() -> httpx.AsyncClient:
    return httpx.AsyncClient(
        trust_env=False,
        follow_redirects=False,
        timeout=None,  # ours is around all of it
        # None are kept: one that cannot be sent again would make every further call fail.
        cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
        limits=httpx.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS),
    )


async def _bounded(response: httpx.Response, whole: bool) -> bytes:
    parts: list[bytes] = []
    room = BODY_BYTES
    # Leaving the loop would leave generators behind, which nobody closes: a cancellation unwinds them.
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
    """Of a URL what may be shown: no path, no credentials."""
    return urlsplit(url).hostname or "the backend"
