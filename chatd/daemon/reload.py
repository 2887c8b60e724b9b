"""SIGHUP: chatd reads its configuration again and applies all options that may change while it runs, or none
of them if the configuration has mistakes.
"""

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
    """Call the instance to reload. It is synchronous, so that no task sees half a configuration, and fast,
    because it reads only a few small files.
    """

    def __init__(self, settings: Settings, chat: Chat, read_again: Callable[[], Config]) -> None:
        self._settings, self._chat, self._read_again = settings, chat, read_again
        self._serving = False
        metrics.RELOADED.set(1)
        metrics.RELOADED_AT.set(time.time())

    def begin(self) -> None:
        """Allow reloads, because the daemon is ready. Earlier, a reload would report READY=1 to systemd."""
        self._serving = True

    def __call__(self) -> None:
        if not self._serving:
            log.warning("reload_too_early", advice="chatd has only just read its configuration")
            return
        systemd.reloading()
        try:
            status = self._reload()
            metrics.RELOADED.set(1)
        except Exception as error:  # no content of a file may end a daemon that serves
            metrics.RELOADED.set(0)
            mistakes = list(error.mistakes) if isinstance(error, ConfigError) else [repr(error)[:500]]
            log.error("reload_refused", mistakes=mistakes, advice="the old configuration stays in force")
            status = "the configuration was not reloaded: it has mistakes"
        metrics.RELOADED_AT.set(time.time())
        systemd.ready(status)

    def _reload(self) -> str:
        """Reload, and return a status line. Raises ConfigError before it has changed anything."""
        config, changed, restart = merge(self._settings.now, self._read_again())
        tokens = self._chat.tokens_of(config)
        self._settings.change(config)
        self._chat.use_tokens(tokens)  # even if no option has changed: a key file may have a new content
        log.info("reloaded", changed=changed)
        if restart:
            log.warning("restart_needed", keys=restart, advice="these take effect when chatd is restarted")
        logs.set_level(config.logs.level)
        return f"reloaded, {len(changed)} options changed" + (
            f"; {len(restart)} need a restart" if restart else ""
        )
