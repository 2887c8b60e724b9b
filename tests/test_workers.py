"""Several workers behind one pair of sockets: they serve as one, and whatever becomes of one harms no other."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import trio
import trio.testing

from chatd.config import Config, Limits, Server
from chatd.core.errors import OperatorError
from chatd.daemon import workers
from chatd.daemon.listen import open_socket
from chatd.daemon.worker import Worker
from tests.client import Client, login
from tests.daemon import TOKEN, Daemon
from tests.services import RedisServer

PATIENCE = 60.0  # seconds for what takes a start, on a busy machine
WATCHDOG = 3.0  # seconds

# What a worker does before it becomes chatd, so that a test can hold it up or make it fail.
HOLD = """
import os, time
if os.environ.get("CHATD_WORKER_NUMBER") == "1":
    while not os.path.exists("go"):
        time.sleep(0.02)
"""
FAIL = """
import os
if os.environ.get("CHATD_WORKER_NUMBER") == "1" and os.path.exists("broken"):
    os._exit(int(open("broken").read()))
"""


class Workers(Daemon):
    """A chatd with two workers."""

    def __init__(self, directory: Path, *, watchdog: float = 0, before: str = "", **settings: Any) -> None:
        super().__init__(directory, server__workers=2, limits__sends_per_second=0, **settings)
        if watchdog:
            self.environ["WATCHDOG_USEC"] = str(round(watchdog * 1e6))
        self.environ["RUNTIME_DIRECTORY"] = str(directory)  # one that was killed cannot tidy up
        (directory / "sitecustomize.py").write_text(before)
        self.environ["PYTHONPATH"] += f":{directory}"

    def start(self) -> Workers:
        """Until both serve, and hear of each other."""
        super().start()
        wait_for(lambda: self.lines("workers_ready"))
        wait_for(lambda: len({(line["worker"], line["link"]) for line in self.lines("redis_link")}) == 6)
        return self

    def close(self) -> None:
        super().close()
        for pid in self.workers.values() if self._process is not None else ():
            os.kill(pid, signal.SIGKILL)

    def lines(self, event: str) -> list[dict[str, Any]]:
        found = [json.loads(line) for line in self.log.splitlines() if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    @property
    def workers(self) -> dict[int, int]:
        """The pid of each, by its number; also of those that have lost their parent."""
        pids = [int(path.name) for path in Path("/proc").glob("[0-9]*")]
        theirs = {pid: environ(pid) for pid in pids}
        parent = str(self.pid)
        return {
            int(found["CHATD_WORKER_NUMBER"]): pid
            for pid, found in theirs.items()
            if found.get("CHATD_WORKER_PARENT") == parent
        }

    def wait_for_workers(self, *gone: int) -> dict[int, int]:
        """Until both are there and ready, and those pids are not."""
        wait_for(lambda: len(self.workers) == 2 and not set(self.workers.values()) & set(gone))
        wait_for(lambda: len(self.lines("ready")) >= 2 + len(gone))
        return self.workers

    @contextmanager
    def only(self, number: int) -> Iterator[None]:
        """In the block this worker is the one that takes new connections."""
        others = [pid for other, pid in self.workers.items() if other != number]
        for pid in others:
            os.kill(pid, signal.SIGSTOP)
            wait_for(lambda pid=pid: state(pid) == "T")  # type: ignore[misc]
        try:
            yield
        finally:
            for pid in others:
                os.kill(pid, signal.SIGCONT)

    def numbers(self) -> dict[str, float]:
        """What /metrics says."""
        pairs = (line.rsplit(" ", 1) for line in self.get("/metrics").body.decode().splitlines())
        return {name: float(value) for name, value in pairs if not name.startswith("#")}


class Backend:
    """A backend whose connection stays with the worker that took it."""

    def __init__(self, crew: Workers, number: int) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", crew.api_port, timeout=PATIENCE)
        with crew.only(number):
            self.ask("GET", "/healthz")

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        headers = {"X-Internal-Token": TOKEN, "Content-Type": "application/json"}
        self._connection.request(method, path, json.dumps(body) if body else None, headers)
        answer = self._connection.getresponse()
        text = answer.read()
        assert answer.status == 200, text
        return text

    def post(self, conversation: int, contents: list[str]) -> None:
        for content in contents:
            body = {"conversation_id": conversation, "sender_id": 9, "content": content}
            self.ask("POST", "/api/ws/messages", body)

    def close(self) -> None:
        self._connection.close()


def wait_for(condition: Callable[[], Any], patience: float = PATIENCE) -> None:
    deadline = time.monotonic() + patience
    while not condition():
        assert time.monotonic() < deadline, "it does not come"
        time.sleep(0.02)


def state(pid: int) -> str:
    """A letter of proc(5); Z also when it is gone."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


def environ(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_text(errors="replace")
    except OSError:
        return {}
    return dict(pair.split("=", 1) for pair in text.split("\0") if "=" in pair)


def gone(*pids: int) -> bool:
    return all(state(pid) == "Z" for pid in pids)


Crews = Callable[..., Workers]
Backends = Callable[[Workers, int], Backend]


@pytest.fixture
def crews(tmp_path_factory: pytest.TempPathFactory, redis_server: RedisServer) -> Iterator[Crews]:
    made: list[Workers] = []

    def make(**settings: Any) -> Workers:
        made.append(Workers(tmp_path_factory.mktemp("crew"), redis__url=redis_server.url, **settings))
        return made[-1]

    yield make
    for crew in made:
        crew.close()


async def started(crew: Workers) -> Workers:
    return await trio.to_thread.run_sync(crew.start)


@asynccontextmanager
async def guest(crew: Workers, number: int, user_id: int, rooms: Any) -> AsyncIterator[Client]:
    """A client of this worker."""
    async with AsyncExitStack() as stack:
        with crew.only(number):
            client = await stack.enter_async_context(login(crew, user_id, rooms))
        yield client


@pytest.fixture
def backend() -> Iterator[Backends]:
    made: list[Backend] = []

    def make(crew: Workers, number: int) -> Backend:
        made.append(Backend(crew, number))
        return made[-1]

    yield make
    for one in made:
        one.close()


async def test_what_is_posted_to_either_both_deliver_in_order(
    crews: Crews, backend: Backends, database_url: str
) -> None:
    crew = await started(crews(database__url=database_url))
    async with guest(crew, 1, 1, {"1": None}) as here, guest(crew, 2, 2, {"1": None}) as there:
        async with trio.open_nursery() as nursery:
            for number, sender in ((1, "a"), (2, "b")):
                contents = [f"{sender}{n}" for n in range(50)]
                post = partial(backend(crew, number).post, 1, contents)
                nursery.start_soon(trio.to_thread.run_sync, post)
        heard = [await client.messages(100) for client in (here, there)]
        assert heard[0] == heard[1]
        assert [m["seq"] for m in heard[0]] == list(range(1, 101))
        for sender in "ab":
            said = [m["content"] for m in heard[0] if m["content"][0] == sender]
            assert said == [f"{sender}{n}" for n in range(50)]
        await here.silence()
        await there.silence()


async def test_the_numbers_are_those_of_all_whoever_is_asked(crews: Crews, backend: Backends) -> None:
    crew = await started(crews(limits__connections=7, limits__handshakes_per_second=100))
    async with guest(crew, 1, 1, {"1": None}) as here, guest(crew, 2, 2, {"1": None}) as there:
        for number in (1, 2):
            await trio.to_thread.run_sync(backend(crew, number).post, 1, ["Hello"])
        for client in (here, there):
            await client.messages(2)
        for number in (1, 2):
            with crew.only(number):
                numbers = crew.numbers()
            assert numbers['chatd_connections{state="ready"}'] == 2
            assert numbers["chatd_redis_up"] == 1
            assert numbers['chatd_messages_posted_total{outcome="ok"}'] == 2
            assert numbers['chatd_messages_delivered_total{source="live"}'] == 4
        killed = crew.workers[1]
        os.kill(killed, signal.SIGKILL)
        await trio.to_thread.run_sync(crew.wait_for_workers, killed)
        numbers = crew.numbers()
        assert numbers['chatd_connections{state="ready"}'] == 1
        assert numbers['chatd_messages_delivered_total{source="live"}'] == 4, "a counter never goes back"
    # What they count each for itself, they have a share of.
    limits = [environ(pid) for pid in crew.workers.values()]
    assert [each["CHATD_WORKERS"] for each in limits] == ["2", "2"]


def test_a_worker_has_a_share_of_what_all_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHATD_WORKERS", "2")
    whole = Config(limits=Limits(connections=7, handshakes_per_second=100, rooms_per_connection=9))
    assert workers.share(whole).limits == Limits(
        connections=3, handshakes_per_second=50, rooms_per_connection=9
    )
    unbounded = Config(limits=Limits(connections=0, handshakes_per_second=1))
    assert workers.share(unbounded).limits == Limits(connections=0, handshakes_per_second=1)


async def test_a_killed_worker_is_replaced_and_nobody_misses_anything(crews: Crews, backend: Backends) -> None:
    crew = await started(crews())
    posting = backend(crew, 2)
    async with guest(crew, 2, 2, {"1": None}) as there:
        async with guest(crew, 1, 1, {"1": None}) as here:
            await trio.to_thread.run_sync(posting.post, 1, ["before"])
            assert (await here.messages(1))[0]["seq"] == 1
            killed = crew.workers[1]
            os.kill(killed, signal.SIGKILL)
            assert (await here.closed())[0] == 1006
        await trio.to_thread.run_sync(posting.post, 1, ["meanwhile"])
        async with login(crew, 1, {"1": 1}) as again:  # the other one takes it in
            missed = again.ready["rooms"]["1"]["changes"]  # type: ignore[attr-defined]
            assert [(m["seq"], m["content"]) for m in missed] == [(2, "meanwhile")]
        await trio.to_thread.run_sync(crew.wait_for_workers, killed)
        async with guest(crew, 1, 1, {"1": 2}) as back:
            await trio.to_thread.run_sync(backend(crew, 1).post, 1, ["after"])
            assert [m["content"] for m in await back.messages(1)] == ["after"]
            assert [m["content"] for m in await there.messages(3)] == ["before", "meanwhile", "after"]
            await there.silence()


async def test_sigterm_sends_all_away_and_leaves_nobody(crews: Crews) -> None:
    crew = await started(crews())
    pids = list(crew.workers.values())
    shared = environ(pids[0])["PROMETHEUS_MULTIPROC_DIR"]
    async with guest(crew, 1, 1, None) as here, guest(crew, 2, 2, None) as there:
        crew.signal(signal.SIGTERM)
        async with trio.open_nursery() as nursery:
            for client in (here, there):
                nursery.start_soon(is_sent_away, client)
    assert await trio.to_thread.run_sync(crew.wait) == 0
    assert gone(*pids)
    assert not await trio.Path(shared).exists(), "something is left behind"


async def is_sent_away(client: Client) -> None:
    assert (await client.closed())[0] == 1012


async def test_a_second_signal_ends_a_long_goodbye(crews: Crews) -> None:
    crew = await started(crews(server__drain_window=300))
    pids = list(crew.workers.values())
    async with guest(crew, 1, 1, None) as here, guest(crew, 2, 2, None) as there:
        crew.signal(signal.SIGTERM)
        for client in (here, there):
            await client.expect("reconnect")
        await trio.sleep(0.6)  # what comes earlier is still the first signal
        assert not gone(*pids)
        crew.signal(signal.SIGTERM)
        assert await trio.to_thread.run_sync(crew.wait) == 1
    assert gone(*pids)


async def test_workers_do_not_outlive_their_parent(crews: Crews) -> None:
    crew = await started(crews())
    pids = list(crew.workers.values())
    async with guest(crew, 1, 1, None) as here, guest(crew, 2, 2, None) as there:
        await trio.to_thread.run_sync(crew.kill)
        async with trio.open_nursery() as nursery:
            for client in (here, there):
                nursery.start_soon(is_sent_away, client)
        await trio.to_thread.run_sync(wait_for, lambda: gone(*pids))
    assert sorted(line["worker"] for line in crew.lines("parent_gone")) == [1, 2]


async def test_a_worker_that_hangs_says_where_and_is_replaced(crews: Crews) -> None:
    crew = await started(crews(watchdog=WATCHDOG))
    stopped = crew.workers[1]
    async with guest(crew, 2, 2, {"1": None}) as there:
        os.kill(stopped, signal.SIGSTOP)
        workers = await trio.to_thread.run_sync(crew.wait_for_workers, stopped)
        await trio.to_thread.run_sync(crew.post, 1, 9, "Hello")
        assert [m["content"] for m in await there.messages(1)] == ["Hello"]
    assert [(line["worker"], line["ready"]) for line in crew.lines("worker_hangs")] == [(1, True)]
    assert "Fatal Python error: Aborted" in crew.log
    assert crew.workers == workers


async def test_a_worker_that_hangs_does_not_hold_up_the_end(crews: Crews) -> None:
    crew = await started(crews(watchdog=WATCHDOG))
    os.kill(crew.workers[1], signal.SIGSTOP)
    assert await trio.to_thread.run_sync(crew.stop) == 1


async def test_a_pause_of_the_whole_machine_is_nobodys_fault(crews: Crews) -> None:
    crew = await started(crews(watchdog=1.0))
    workers = crew.workers
    family = [crew.pid, *workers.values()]
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    await trio.sleep(2.5)  # longer than the watchdog, and than what the parent takes for its own delay
    for pid in family:
        os.kill(pid, signal.SIGCONT)
    async with guest(crew, 1, 1, None) as here, guest(crew, 2, 2, None) as there:
        await trio.sleep(2.0)
        await here.silence()
        await there.silence()
    assert crew.workers == workers
    assert not crew.lines("worker_hangs")


async def test_sighup_reloads_all_of_them(crews: Crews) -> None:
    crew = await started(crews())
    workers = crew.workers
    async with guest(crew, 1, 1, None) as here, guest(crew, 2, 2, None) as there:
        crew.signal(signal.SIGHUP)
        await trio.to_thread.run_sync(wait_for, lambda: len(crew.lines("reloaded")) == 2)
        await here.silence()
        await there.silence()
    assert {line["worker"] for line in crew.lines("reloaded")} == {1, 2}
    assert crew.workers == workers


# How they start.


def manager(directory: Path) -> socket.socket:
    """What systemd would hear."""
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    bound.bind(str(directory / "notify"))
    bound.settimeout(PATIENCE)
    return bound


def hear(bound: socket.socket, wanted: str) -> list[str]:
    """Everything until that."""
    heard: list[str] = []
    while wanted not in heard:
        heard += bound.recv(4096).decode().splitlines()
    return heard


async def test_ready_means_that_all_are(crews: Crews) -> None:
    crew = crews(watchdog=60, before=HOLD)
    with manager(crew.directory) as bound:
        crew.environ["NOTIFY_SOCKET"] = str(crew.directory / "notify")
        await trio.to_thread.run_sync(Daemon.start, crew)
        await trio.to_thread.run_sync(wait_for, lambda: crew.lines("ready"))
        heard = hear(bound, "STATUS=serving 0 connections, 1 of 2 workers are ready")
        assert "READY=1" not in heard
        assert "WATCHDOG=1" in heard, "systemd would end a parent that waits"
        assert not crew.lines("workers_ready")
        (crew.directory / "go").touch()
        await trio.to_thread.run_sync(hear, bound, "READY=1")
        crew.signal(signal.SIGTERM)
        stopping = await trio.to_thread.run_sync(hear, bound, "STOPPING=1")
        assert any(line.startswith("EXTEND_TIMEOUT_USEC=") for line in stopping)
        assert await trio.to_thread.run_sync(crew.wait) == 0


@pytest.mark.parametrize("code", [1, 78])
def test_what_a_worker_cannot_start_with_ends_all(crews: Crews, code: int) -> None:
    crew = crews(before=FAIL)
    (crew.directory / "broken").write_text(str(code))
    with pytest.raises(AssertionError, match=f"chatd ended with {code}:"):
        crew.start()
    assert not crew.lines("workers_ready")


async def test_a_worker_that_cannot_come_back_is_tried_again_and_again(crews: Crews) -> None:
    crew = await started(crews(before=FAIL))
    broken = crew.directory / "broken"
    broken.write_text("78")
    async with guest(crew, 2, 2, {"1": None}) as there:
        os.kill(crew.workers[1], signal.SIGKILL)
        await trio.to_thread.run_sync(wait_for, lambda: len(crew.lines("worker_ended")) == 4)
        await trio.to_thread.run_sync(crew.post, 1, 9, "Hello")
        assert [m["content"] for m in await there.messages(1)] == ["Hello"]
        broken.unlink()
        await trio.to_thread.run_sync(wait_for, lambda: len(crew.lines("ready")) == 3)
    ends = crew.lines("worker_ended")
    assert [line["code"] for line in ends[:4]] == [-signal.SIGKILL, 78, 78, 78]
    waits = [line["again_in"] for line in ends[:4]]
    assert all(0.05 * 2**n <= waited <= 0.1 * 2**n for n, waited in enumerate(waits)), waits


async def test_where_nobody_serves_the_next_start_is_soon(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    """One at a time; the others go on waiting, so that a machine in trouble is not busy with starts."""
    crew = workers.Workers(Config(server=Server(workers=3)), [], tmp_path, Config, lambda: None)
    first, second, third = crew._workers
    over: dict[int, float] = {}

    async def back_off(worker: Worker) -> None:
        await crew._back_off(worker, 8.0)
        over[worker.number] = trio.current_time()

    async with trio.open_nursery() as nursery:
        began = trio.current_time()
        for worker in (first, second, third):
            nursery.start_soon(back_off, worker)
        await trio.sleep(workers.ALONE_MOST)
        (number,) = over
        assert over[number] - began <= workers.BACKOFF_FIRST
        started = crew._workers[number - 1]
        started.process = cast(trio.Process, object())  # it starts, or serves: nobody else is in a hurry
        await trio.sleep(2.0)
        assert len(over) == 1
        started.ended()
        crew._tell()
        await trio.sleep(workers.ALONE_MOST)
        assert len(over) == 2
        nursery.cancel_scope.cancel()


def test_a_place_that_is_tidied_away_ends_nobody_but_the_next_start(crews: Crews) -> None:
    crew = crews().start()
    shared = Path(environ(crew.workers[1])["PROMETHEUS_MULTIPROC_DIR"])
    shutil.rmtree(shared)
    killed = crew.workers[1]
    os.kill(killed, signal.SIGKILL)
    wait_for(lambda: crew.lines("worker_not_started"))
    assert runs(crew.pid)
    shared.mkdir()
    crew.wait_for_workers(killed)


async def test_workers_without_a_parent_leave_the_addresses_to_the_next(crews: Crews) -> None:
    """At once, and not when they have sent their clients away."""
    crew = await started(crews(server__drain_window=300))
    pids = list(crew.workers.values())
    async with guest(crew, 1, 1, None) as here, guest(crew, 2, 2, None) as there:
        await trio.to_thread.run_sync(crew.kill)
        for client in (here, there):
            await client.expect("reconnect")
        await trio.to_thread.run_sync(wait_for, lambda: len(crew.lines("parent_gone")) == 2)
        for port in (crew.hub_port, crew.api_port):
            await trio.to_thread.run_sync(wait_for, partial(is_free, port))
        assert not gone(*pids)


def is_free(port: int) -> bool:
    try:
        open_socket("hub.bind", f"127.0.0.1:{port}").close()
    except OperatorError:
        return False
    return True


def runs(pid: int) -> bool:
    return state(pid) not in "ZX"


@pytest.mark.service
def test_workers_need_redis(tmp_path: Path) -> None:
    ended = Daemon(tmp_path, server__workers=2).command("serve")
    assert ended.returncode == 78
    assert "server.workers: several workers exchange messages through Redis" in ended.stderr


@pytest.mark.parametrize("place", ["nowhere", 100 * "x"])
def test_no_place_for_the_sockets_is_said_in_a_sentence(crews: Crews, tmp_path: Path, place: str) -> None:
    crew = crews()
    crew.environ["RUNTIME_DIRECTORY"] = str(tmp_path / place)
    if place != "nowhere":
        (tmp_path / place).mkdir()  # a path that is too long for a socket
    ended = crew.command("serve")
    assert ended.returncode == 1
    assert "server.workers: " in ended.stderr
    assert "Traceback" not in ended.stderr


def test_a_taken_port_is_said_in_a_sentence(crews: Crews) -> None:
    crew = crews()
    with socket.create_server(("127.0.0.1", crew.hub_port)):
        ended = crew.command("serve")
    assert ended.returncode == 1
    assert "hub.bind: cannot listen on" in ended.stderr
    assert "Traceback" not in ended.stderr
