"""SIGHUP: the configuration is read anew, and what may change while chatd runs does; all of it, or nothing."""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

from chatd.chat.chat import Chat
from chatd.config import Config
from chatd.config.settings import Settings, merge
from chatd.core.errors import ConfigError
from chatd.daemon import systemd
from chatd.observe import logs, metrics

log = structlog.get_logger()


class Reload:
    """Call it to reload. Synchronous: a few small files are read, and nobody sees half a configuration."""

    def __init__(self, settings: Settings, chat: Chat, read_again: Callable[[], Config]) -> None:
        self._settings, self._chat, self._read_again = settings, chat, read_again
        self._serving = False
        metrics.RELOADED.set(1)
        metrics.RELOADED_AT.set(time.time())

    def begin(self) -> None:
        """The daemon is ready. Before, a reload would tell systemd that it is."""
        self._serving = True

    def __call__(self) -> None:
        if not self._serving:
            log.warning("reload_too_early", advice="chatd has only just read its configuration")
            return
        systemd.reloading()
        try:
            status = self._reload()
            metrics.RELOADED.set(1)
        except Exception as error:  # nothing that a file can hold ends a daemon that serves
            metrics.RELOADED.set(0)
            mistakes = list(error.mistakes) if isinstance(error, ConfigError) else [repr(error)[:500]]
            log.error("reload_refused", mistakes=mistakes, advice="the old configuration stays in force")
            status = "the configuration was not reloaded: it has mistakes"
        metrics.RELOADED_AT.set(time.time())
        systemd.ready(status)

    def _reload(self) -> str:
        """What became of it. Raises ConfigError before it has changed anything."""
        config, changed, restart = merge(self._settings.now, self._read_again())
        tokens = self._chat.tokens_of(config)
        self._settings.change(config)
        self._chat.use_tokens(tokens)  # whatever has changed: a key file may have another content
        log.info("reloaded", changed=changed)
        if restart:
            log.warning("restart_needed", keys=restart, advice="these take effect when chatd is restarted")
        logs.set_level(config.logs.level)
        return f"reloaded, {len(changed)} options changed" + (
            f"; {len(restart)} need a restart" if restart else ""
        )
