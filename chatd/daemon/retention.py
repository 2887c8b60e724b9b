"""Retention: once an hour, deletes the messages that are older, or more, than `[retention]` allows. It deletes
in small steps with pauses, so that other writes do not wait long.
"""

from __future__ import annotations

import structlog
import trio

from chatd.config.settings import Settings
from chatd.core.errors import Unavailable
from chatd.observe import metrics
from chatd.store.upkeep import retention

FIRST = 60.0  # seconds from the start to the first run, so that clients have reconnected by then
PERIOD = 3600.0  # seconds between two runs

log = structlog.get_logger()


class RetentionClock:
    def __init__(self, settings: Settings, store: retention.Pruning, *, first: float = FIRST) -> None:
        self._settings, self._store, self._first = settings, store, first

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled. New settings take effect with the next round."""
        task_status.started()
        await trio.sleep(self._first)
        while True:
            kept = self._settings.now.retention
            rules = retention.Rules(kept.days, kept.messages)
            try:
                if rules:
                    await self._prune(rules)
                await self._remove_leftovers()
            except Unavailable:
                log.warning("retention_unavailable")
            except Exception as error:  # a failed deletion must not end the daemon: the next round tries again
                log.error("retention_failed", exc_info=error)
            await trio.sleep(PERIOD)

    async def _prune(self, rules: retention.Rules) -> None:
        """Delete what the rules do not keep. Raises Unavailable."""
        count, began = 0, trio.current_time()
        pruner = await self._store.find(rules)
        while (removed := await self._store.step(pruner)) is not None:
            count += removed
            metrics.PRUNED.inc(removed)
            await trio.sleep(retention.PAUSE)
        if count:
            log.info("retention", messages=count, seconds=round(trio.current_time() - began, 1))

    async def _remove_leftovers(self) -> None:
        """Remove rows that deleted messages have left. Raises Unavailable."""
        removed = 1
        while removed:
            await trio.sleep(retention.PAUSE)
            removed = await self._store.remove_leftovers()
