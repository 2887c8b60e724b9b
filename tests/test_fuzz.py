"""Every route of /openapi.json with what its own description allows, and with what it does not.

Whatever a backend sends: no 500, an error that says what is wrong, and nobody else notices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import schemathesis
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.client import Client, login
from tests.daemon import TOKEN, Daemon

pytestmark = pytest.mark.service

EXAMPLES = 15  # of each route, valid ones and others
ROOM, USER = 7_700_111_222, 7_700_111_223  # of those who must not notice: no example knows them
EXPECTED = {200, 400, 401, 403, 404, 405, 406, 409, 411, 413, 415, 422}


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("daemon"), limits__sends_per_second=0).start()
    yield daemon
    daemon.close()


def operations(daemon: Daemon) -> Iterator[Any]:
    schema = schemathesis.openapi.from_dict(daemon.get("/openapi.json").json)
    for found in schema.get_all_operations():
        yield found.ok()


def attack(daemon: Daemon, operation: Any, mode: GenerationMode) -> int:
    """How many examples were sent."""
    sent = 0

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def run(case: Any) -> None:
        nonlocal sent
        answer = case.call(base_url=daemon.url, headers={"X-Internal-Token": TOKEN})
        sent += 1
        where = f"{case.method} {case.formatted_path}: {answer.status_code} {answer.text[:200]}"
        assert answer.status_code in EXPECTED, where
        if answer.status_code not in (200, 405, 406):
            assert answer.json()["code"], where

    with suppress(Unsatisfiable):  # a route that takes nothing can be given nothing that is wrong
        run()
    return sent


async def test_no_request_breaks_anything(fuzzed: Daemon) -> None:
    async with login(fuzzed, USER, {str(ROOM): None}) as bystander:
        sent = 0
        for operation in await trio.to_thread.run_sync(lambda: list(operations(fuzzed))):
            for mode in GenerationMode:
                sent += await trio.to_thread.run_sync(attack, fuzzed, operation, mode)
            await still_there(fuzzed, bystander, f"after {operation.label}")
        assert sent > 300
    wrong = [line for line in fuzzed.log.splitlines() if '"level": "error"' in line or "Traceback" in line]
    assert wrong == []


async def still_there(daemon: Daemon, client: Client, content: str) -> None:
    await trio.to_thread.run_sync(partial(daemon.post, ROOM, 2, content))
    await client.expect("message", content=content)
    await client.request("ping")  # a sign of life: all of this may take longer than silence is allowed
