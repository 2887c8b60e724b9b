"""Who may come in: tokens with every kind of key, key servers, the backend's word, and the fence around calls.

A test that holds a line of the security list bears its number.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import jwt
import pytest
import structlog.testing
import trio
import trio.testing
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

from chatd.auth.keyserver import KEEP, UNKNOWN, KeyServer
from chatd.auth.tokens import Tokens
from chatd.backend.auth_callback import AuthCallback
from chatd.backend.breaker import REST
from chatd.backend.fetch import Answer, Fetcher
from chatd.config import Api, Auth, Config
from chatd.config.settings import Settings
from chatd.core.errors import CallFailed, ConfigError, Forbidden, TokenExpired, Unauthorized, Unavailable
from tests.backend import Backend, serving
from tests.client import connect, login
from tests.conftest import Daemons
from tests.services import free_port

SECRET = "s" * 32
LOOPBACK = ["127.0.0.0/8", "::1/128"]
RSA, OTHER_RSA = (rsa.generate_private_key(public_exponent=65537, key_size=2048) for _ in range(2))
EC = ec.generate_private_key(ec.SECP256R1())
ED = ed25519.Ed25519PrivateKey.generate()
PRIVATE = {"RS256": RSA, "ES256": EC, "EdDSA": ED}


def pem(key: Any) -> bytes:
    return bytes(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))


def claims(**more: Any) -> dict[str, Any]:
    return {"sub": "7", "exp": time.time() + 60} | more


def sign(algorithm: str, key: Any = None, headers: dict[str, Any] | None = None, **more: Any) -> str:
    return jwt.encode(claims(**more), key or PRIVATE[algorithm], algorithm=algorithm, headers=headers)


def files(tmp_path: Path, *keys: Any) -> list[str]:
    paths = [tmp_path / f"{number}.pem" for number in range(len(keys))]
    for path, key in zip(paths, keys, strict=True):
        path.write_bytes(pem(key))
    return [str(path) for path in paths]


@pytest.fixture
def backend() -> Iterator[Backend]:
    with serving() as one:
        yield one


@pytest.fixture
async def fetch() -> AsyncIterator[Fetcher]:
    fetcher = Fetcher(LOOPBACK)
    yield fetcher
    await fetcher.close()


# Tokens.


@pytest.mark.parametrize("algorithm", PRIVATE)
async def test_a_public_key_from_a_file_is_enough(tmp_path: Path, algorithm: str) -> None:
    config = Auth(algorithms=[algorithm], key_files=files(tmp_path, OTHER_RSA, PRIVATE[algorithm]))
    tokens = Tokens("", config)
    for given, opened in (([4], {4}), (None, set())):
        identity = await tokens.authenticate(sign(algorithm, conversations=given))
        assert (identity.user_id, identity.conversations) == (7, opened)
    with pytest.raises(TokenExpired):
        await tokens.authenticate(sign(algorithm, exp=1))
    with pytest.raises(Forbidden, match="issues no tokens"):
        tokens.issue(7, 60)


async def test_s4_a_token_does_not_choose_how_it_is_verified(tmp_path: Path) -> None:
    public = pem(RSA)
    tokens = Tokens(SECRET, Auth(algorithms=["HS256", "RS256"], key_files=files(tmp_path, RSA, EC)))
    assert (await tokens.authenticate(sign("RS256"))).user_id == 7
    assert (await tokens.authenticate(sign("HS256", SECRET))).user_id == 7
    body = base64.urlsafe_b64encode(json.dumps(claims()).encode()).rstrip(b"=").decode()

    def forged(header: dict[str, str], signature: str = "") -> str:
        head = base64.urlsafe_b64encode(json.dumps(header).encode()).rstrip(b"=").decode()
        return f"{head}.{body}.{signature}"

    signed = forged({"alg": "HS256", "typ": "JWT"}).rstrip(".")
    mac = base64.urlsafe_b64encode(hmac.digest(public, signed.encode(), hashlib.sha256)).rstrip(b"=").decode()
    for token in (
        forged({"alg": "none"}),
        forged({"alg": "None"}),
        f"{signed}.{mac}",  # HS256 with the public RSA key as the secret
        sign("ES256"),  # its key is there, but the algorithm is not in the list
        sign("RS512", RSA),
        sign("RS256", OTHER_RSA),
        sign("HS256", "t" * 32),
    ):
        with pytest.raises(Unauthorized):
            await tokens.authenticate(token)


async def test_s5_claims_are_checked() -> None:
    tokens = Tokens(SECRET, Auth(secret=SECRET, audience="chat", issuer="https://login.example.com", leeway=5))
    good: dict[str, Any] = {"aud": "chat", "iss": "https://login.example.com"}
    assert (await tokens.authenticate(sign("HS256", SECRET, **good))).user_id == 7
    assert (await tokens.authenticate(tokens.issue(7, 60))).user_id == 7
    assert await tokens.authenticate(sign("HS256", SECRET, **good, exp=time.time() - 2))  # within the leeway
    for wrong in (
        {"aud": "mail"},
        {"aud": None},
        {"iss": "https://login.example.co"},
        {"iss": ["https://login.example.com"]},
        {"iss": None},
        {"nbf": time.time() + 600},
        {"exp": None},
        {"sub": None},
        {"sub": "x"},
        {"sub": 2**53},
        {"conversations": "1"},
        {"conversations": {"a": 1}},
        {"sub": "0190d1a2-7f3b-7c4d-8e5f-123456789abc"},
    ):
        filled = {key: value for key, value in (claims() | good | wrong).items() if value is not None}
        with pytest.raises(Unauthorized):
            await tokens.authenticate(jwt.api_jws.encode(json.dumps(filled).encode(), SECRET, "HS256"))
    with pytest.raises(Unauthorized):
        await tokens.authenticate(sign("HS256", SECRET, {"crit": ["exp"], "exp": 1}, **good))


@pytest.mark.parametrize("subject", [7, "7", " 7 "])
@pytest.mark.parametrize(
    ("rooms", "opened"),
    [(["1", 2, " 3 "], {1, 2, 3}), ({"0": 1, "2": "3"}, {1, 3}), ([], set()), (None, set())],
)
def test_ids_in_a_token_may_be_text(subject: Any, rooms: Any, opened: set[int]) -> None:
    body = claims(sub=subject, conversations=rooms)
    identity = Tokens(SECRET).verify(jwt.api_jws.encode(json.dumps(body).encode(), SECRET, "HS256"))
    assert (identity.user_id, identity.conversations) == (7, opened)


@pytest.mark.parametrize("algorithm", ["HS384", "HS512"])
async def test_a_longer_hash_counts_where_it_is_listed(tmp_path: Path, algorithm: str) -> None:
    secret, previous = "s" * 64, "p" * 64
    tokens = Tokens("", Auth(secret=secret, previous_secret=previous, algorithms=[algorithm]))
    assert (await tokens.authenticate(sign(algorithm, secret))).user_id == 7
    assert (await tokens.authenticate(sign(algorithm, previous))).user_id == 7
    own = tokens.issue(7, 60, since=5)
    assert jwt.get_unverified_header(own)["alg"] == algorithm
    assert (await tokens.authenticate(own)).after == 5
    both = Tokens(
        "", Auth(secret=secret, algorithms=["RS256", algorithm, "HS256"], key_files=files(tmp_path, RSA))
    )
    for token in (sign(algorithm, secret), sign("HS256", secret), sign("RS256"), both.issue(7, 60)):
        assert (await both.authenticate(token)).user_id == 7
    for wrong in (sign("HS256", secret), sign(algorithm, "x" * 64)):
        with pytest.raises(Unauthorized):
            await tokens.authenticate(wrong)
    with pytest.raises(Unauthorized):
        await Tokens(secret).authenticate(sign(algorithm, secret))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"no key", "not a public key in PEM"),
        (pem(rsa.generate_private_key(public_exponent=65537, key_size=1024)), "2048 bits"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "P-256"),
        (None, "No such file"),
    ],
)
def test_a_key_file_that_is_none_is_a_mistake_of_the_operator(
    tmp_path: Path, content: bytes | None, sentence: str
) -> None:
    path = tmp_path / "key.pem"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError, match=sentence):
        Tokens("", Auth(algorithms=["RS256"], key_files=[str(path)]))


# Key servers.


def jwk(key: Any, kid: str, **more: Any) -> dict[str, Any]:
    kinds = {
        rsa.RSAPrivateKey: jwt.algorithms.RSAAlgorithm,
        ec.EllipticCurvePrivateKey: jwt.algorithms.ECAlgorithm,
    }
    algorithm = next((a for kind, a in kinds.items() if isinstance(key, kind)), jwt.algorithms.OKPAlgorithm)
    return dict(algorithm.to_jwk(key.public_key(), as_dict=True)) | {"kid": kid} | more


def by_server(fetch: Fetcher, backend: Backend) -> Tokens:
    server = KeyServer(fetch, f"{backend.url}/jwks.json")
    return Tokens("", Auth(algorithms=["RS256", "ES256", "EdDSA"], jwks_url=backend.url), server)


async def test_s6_keys_are_fetched_seldom_rotate_and_are_withdrawn(
    fetch: Fetcher, backend: Backend, autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [jwk(RSA, "a"), jwk(EC, "b"), jwk(ED, "c"), {"kty": "oct", "k": "AAAA", "kid": "x"}, {"kty": 5}]

    async def read(method: str, url: str, **_: Any) -> Any:
        backend.asked.append(None)  # type: ignore[arg-type]
        return Answer(200, json.dumps({"keys": keys}).encode())

    tokens = by_server(read, backend)  # type: ignore[arg-type]
    for algorithm, kid in (("RS256", "a"), ("ES256", "b"), ("EdDSA", "c")):
        assert await tokens.authenticate(sign(algorithm, headers={"kid": kid}))
    assert await tokens.authenticate(sign("RS256"))  # without a kid all of its kind are tried
    assert len(backend.asked) == 1
    # Whoever makes up kids, or names a place of their own, makes us fetch nothing.
    evil = {"jku": f"{backend.url}/evil", "x5u": f"{backend.url}/evil", "jwk": jwk(OTHER_RSA, "e")}
    for number in range(50):
        with pytest.raises(Unauthorized):
            await tokens.authenticate(sign("RS256", OTHER_RSA, evil | {"kid": f"../{number}' OR 1"}))
    assert len(backend.asked) == 1
    # A rotated key works with the next fetch, which an unknown kid brings about once a minute.
    keys[0] = jwk(OTHER_RSA, "d")
    await trio.sleep(UNKNOWN)
    assert await tokens.authenticate(sign("RS256", OTHER_RSA, {"kid": "d"}))
    assert len(backend.asked) == 2
    # A withdrawn one fails once what we keep is too old.
    keys[:] = keys[:1]
    assert await tokens.authenticate(sign("ES256", headers={"kid": "b"}))
    await trio.sleep(KEEP)
    with pytest.raises(Unauthorized):
        await tokens.authenticate(sign("ES256", headers={"kid": "b"}))
    assert len(backend.asked) == 3


async def test_a_key_server_that_is_down_is_no_refusal(fetch: Fetcher, backend: Backend) -> None:
    tokens = by_server(fetch, backend)
    for wrong in ((500, {}), (200, b"<html>"), (200, {"keys": 5}), (200, [1]), (200, {"keys": [{"kty": []}]})):
        backend.answer = lambda asked, wrong=wrong: wrong  # type: ignore[misc]
        with pytest.raises(Unavailable, match="key server"):
            await tokens.authenticate(sign("RS256"))
    backend.answer = lambda asked: (200, {"keys": [jwk(RSA, "a")]})
    await trio.sleep(1.1)  # it is asked once a second
    assert (await tokens.authenticate(sign("RS256"))).user_id == 7


# The backend's word.


def by_backend(fetch: Fetcher, backend: Backend, **more: Any) -> AuthCallback:
    config = Config(api=Api(internal_token="internal"), auth=Auth(backend_url=f"{backend.url}/auth", **more))
    return AuthCallback(Settings(config), fetch)


async def test_the_backend_says_who_it_is_and_is_asked_once(fetch: Fetcher, backend: Backend) -> None:
    backend.answer = lambda asked: (200, {"user_id": 7, "expires_in": 60, "conversations": [1]})
    backend.pause = 0.1
    auth = by_backend(fetch, backend)
    found: list[Any] = []

    async def ask() -> None:
        found.append(await auth.authenticate("opaque"))

    async with trio.open_nursery() as nursery:
        for _ in range(20):
            nursery.start_soon(ask)
    assert [(one.user_id, one.conversations) for one in found] == [(7, {1})] * 20
    (asked,) = backend.asked
    assert (asked.json, asked.headers["x-internal-token"]) == ({"token": "opaque"}, "internal")
    assert 0 <= time.time() - found[0].issued_at < 5
    assert 55 < found[0].expires_at - time.time() <= 60
    await auth.authenticate("another")
    assert len(backend.asked) == 2


async def test_what_is_a_no_and_what_is_no_answer(fetch: Fetcher, backend: Backend) -> None:
    auth = by_backend(fetch, backend)
    for status in (401, 403, 404, 422):
        backend.answer = lambda asked, status=status: (status, {})  # type: ignore[misc]
        with pytest.raises(Unauthorized):
            await auth.authenticate("x")
    for body in (
        b"",
        b"<html>",
        {"user_id": 0, "expires_in": 5},
        {"user_id": "0190d1a2-7f3b-7c4d-8e5f-123456789abc", "expires_in": 5},
        {"user_id": 7, "expires_in": -1},
        {"user_id": 7, "expires_in": "nan"},
        {"user_id": 7, "expires_in": "soon"},
        {"data": {"data": {"user_id": 7}}},
        {"data": []},
        [],
    ):
        auth = by_backend(fetch, backend)
        backend.answer = lambda asked, body=body: (200, body)  # type: ignore[misc]
        with pytest.raises(Unavailable):
            await auth.authenticate("x")


@pytest.mark.parametrize(
    ("status", "body", "seconds"),
    [
        (200, {"user_id": "7", "expires_in": 60, "conversations": ["1", 2]}, 60),
        (200, {"user_id": " 7 ", "expires_in": "60", "conversations": {"0": 1, "3": " 2 "}}, 60),
        (200, {"user_id": 7, "expires_in": None, "conversations": [1, 2]}, 3600),
        (200, {"user_id": 7, "conversations": [1, 2]}, 3600),
        (201, {"data": {"user_id": 7, "expires_in": 60.5, "conversations": [1, 2]}}, 60),
    ],
)
async def test_a_backend_answers_as_laravel_does(
    fetch: Fetcher, backend: Backend, status: int, body: Any, seconds: float
) -> None:
    backend.answer = lambda asked: (status, body)
    found = await by_backend(fetch, backend).authenticate("opaque")
    assert (found.user_id, found.conversations) == (7, {1, 2})
    assert seconds - 5 < found.expires_at - time.time() <= seconds + 1
    assert backend.asked[0].headers["accept"] == "application/json"


@pytest.mark.parametrize(
    ("status", "body", "advice"),
    [
        (302, b"", "routes/api.php, without `auth`"),
        (419, b"", "not in routes/web.php"),
        (429, b"", "exempt this route from `throttle`"),
        (500, b"<html>", "storage/logs/laravel.log"),
        (405, b"", "see its own log"),
        (200, b"<html>", '{"user_id": 5, "expires_in": 3600} as JSON'),
    ],
)
async def test_the_log_says_what_to_do_about_a_wrong_answer(
    fetch: Fetcher, backend: Backend, status: int, body: bytes, advice: str
) -> None:
    backend.answer = lambda asked: (status, body)
    auth = by_backend(fetch, backend)
    with structlog.testing.capture_logs() as lines:
        for number in range(4):
            with pytest.raises(Unavailable):
                await auth.authenticate(str(number))
    (line,) = lines
    assert (line["event"], line["error"]) == (
        "auth_backend_failed",
        f"the backend answered {status} without a valid login",
    )
    assert advice in line["advice"]


async def test_s26_a_backend_that_is_down_costs_nobody_a_hang(fetch: Fetcher, backend: Backend) -> None:
    auth = by_backend(fetch, backend, backend_timeout=0.3)
    backend.pause = 1.0
    for number in range(5):
        began = trio.current_time()
        with pytest.raises(Unavailable):
            await auth.authenticate(f"slow {number}")
        assert trio.current_time() - began < 0.9
    asked = len(backend.asked)
    began = trio.current_time()
    for number in range(100):  # the breaker is open: nobody waits, and nobody calls
        with pytest.raises(Unavailable):
            await auth.authenticate(f"open {number}")
    assert trio.current_time() - began < 0.2
    assert len(backend.asked) == asked
    backend.pause = 0.0
    backend.answer = lambda asked: (200, {"user_id": 7, "expires_in": 60})
    await trio.sleep(REST)
    assert (await auth.authenticate("again")).user_id == 7


# The fence.


async def test_s25_only_what_may_be_called_is_called(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    port = backend.url.rpartition(":")[2]
    names = {
        "metadata.example.com": "169.254.169.254",
        "inside.example.com": "10.0.0.7",
        "loop.example.com": "127.0.0.1",
        "mapped.example.com": "::ffff:127.0.0.1",
        "nowhere.example.com": "0.0.0.0",
        "public.example.com": "93.184.216.34",
    }
    real = trio.socket.getaddrinfo

    async def look_up(host: Any, *rest: Any, **more: Any) -> Any:
        name = host.decode() if isinstance(host, bytes) else host
        return await real(names.get(name, name), *rest, **more)

    monkeypatch.setattr(trio.socket, "getaddrinfo", look_up)
    strict, usual = Fetcher([]), Fetcher(LOOPBACK)
    for name in names:
        with pytest.raises(CallFailed) as refused:
            await strict("GET", f"http://{name}:{port}/", within=2)
        assert "may not be called" in refused.value.reason
    for url in (f"http://127.0.0.1:{port}/", f"http://[::ffff:127.0.0.1]:{port}/", f"http://localhost:{port}/"):
        with pytest.raises(CallFailed) as refused:
            await strict("GET", url, within=2)
        assert "may not be called" in refused.value.reason
    assert backend.asked == []
    assert (await usual("GET", f"http://loop.example.com:{port}/x", within=2)).status == 200
    assert backend.asked[0].headers["host"] == f"loop.example.com:{port}"  # the name, at the judged address
    # Redirects are not followed, and what is too much is not read.
    backend.answer = lambda asked: (302, {}, {"Location": f"http://169.254.169.254:{port}/"})
    assert (await usual("GET", f"{backend.url}/", within=2)).status == 302
    backend.answer = lambda asked: (200, b"x" * 70_000)
    with pytest.raises(CallFailed) as refused:
        await usual("GET", f"{backend.url}/", within=2)
    assert "cannot be reached" in refused.value.reason
    await strict.close()
    await usual.close()


# With a daemon.


async def test_a_daemon_asks_its_backend(daemons: Daemons, backend: Backend) -> None:
    backend.answer = lambda asked: (
        (200, {"user_id": int(asked.json["token"]), "expires_in": 60})
        if asked.json["token"].isdecimal()
        else (401, {"message": "Unauthenticated."})
    )
    daemon = daemons(auth__backend_url=f"{backend.url}/chat/auth", auth__backend_timeout=0.5)
    async with login(daemon, 7, {"1": None}, token="7") as client:
        assert client.ready["user_id"] == 7  # type: ignore[attr-defined]
        # A fresh token that nobody can judge just now ends nothing.
        backend.answer = lambda asked: (500, {})
        assert (await client.request("refresh", token="8"))["code"] == "unavailable"
        await client.request("ping")
    for token, code, close in (("9", "unavailable", 4005), ("x", "unauthorized", 4500)):
        if code == "unauthorized":
            backend.answer = lambda asked: (401, {})
        async with connect(daemon.ws_url) as client:
            await client.next()
            assert (await client.request("auth", token=token))["code"] == code
            assert (await client.closed())[0] == close
    answer = daemon.request("POST", "/api/ws/tokens", {"user_id": 7})
    assert (answer.status, answer.json["code"]) == (403, "forbidden")


async def test_an_expired_token_has_a_grace(daemons: Daemons) -> None:
    daemon = daemons(auth__secret=SECRET, auth__expiry_grace=1.0)
    token = sign("HS256", SECRET, exp=time.time() + 1)
    async with login(daemon, 7, token=token) as client, login(daemon, 7, token=token) as other:
        began = trio.current_time()
        await trio.sleep(1.2)  # it has expired, and its owner is still here
        fresh = await client.request("refresh", token=daemon.token_for(7))
        assert fresh["event"] == "ok"
        assert 3590 < fresh["expires_in"] <= 3600
        assert (await other.closed())[0] == 4001
        assert 1.5 < trio.current_time() - began < 4
        await client.request("ping")


async def test_where_the_backend_is_stays_between_chatd_and_its_operator(daemons: Daemons) -> None:
    """Nobody who is not logged in is told a host's name, or what is wrong with it."""
    daemon = daemons(auth__backend_url=f"http://localhost:{free_port()}/auth", hub__allow_query_token="true")
    urls = [daemon.ws_url, f"{daemon.ws_url}?token=x&conversation_id=1"]
    for url in urls:
        async with connect(url) as client:
            if url is urls[0]:
                await client.expect("hello")
                await client.send("auth", token="x", ref=1)
            error = await client.expect("error")
            assert (error["code"], error["message"]) == ("unavailable", "the backend does not answer")
            assert await client.closed() == (4005, "the backend does not answer")
    (line,) = [line for line in daemon.log.splitlines() if '"auth_backend_failed"' in line]
    assert "localhost cannot be reached: ConnectError" in line
    assert 'chatd_backend_answers{call="auth"} 0.0' in daemon.get("/metrics").body.decode()
