"""Retention: once an hour, what is older or more than `[retention]` allows goes, bit by bit beside all else."""

from __future__ import annotations

import structlog
import trio

from chatd.config.settings import Settings
from chatd.core.errors import Unavailable
from chatd.observe import metrics
from chatd.store.upkeep import retention

FIRST = 60.0  # seconds after the start, when everybody has come back
PERIOD = 3600.0  # seconds

log = structlog.get_logger()


class RetentionClock:
    def __init__(self, settings: Settings, store: retention.Pruning, *, first: float = FIRST) -> None:
        self._settings, self._store, self._first = settings, store, first

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """For ever. A reload takes effect with the next round."""
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
            except Exception as error:  # what is old can wait; those who chat cannot
                log.error("retention_failed", exc_info=error)
            await trio.sleep(PERIOD)

    async def _prune(self, rules: retention.Rules) -> None:
        """Raises Unavailable."""
        count, began = 0, trio.current_time()
        pruner = await self._store.find(rules)
        while (removed := await self._store.step(pruner)) is not None:
            count += removed
            metrics.PRUNED.inc(removed)
            await trio.sleep(retention.PAUSE)
        if count:
            log.info("retention", messages=count, seconds=round(trio.current_time() - began, 1))

    async def _remove_leftovers(self) -> None:
        """Raises Unavailable."""
        removed = 1
        while removed:
            await trio.sleep(retention.PAUSE)
            removed = await self._store.remove_leftovers()
