"""`backup`, `restore`, `prune`, `user export`, `user erase`: the commands that work on the data itself."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic, sleep
from typing import Any

import click
import msgspec

from chatd import config
from chatd.bus import erasure as stream
from chatd.cli.group import main, with_config
from chatd.core.errors import OperatorError
from chatd.core.limits import MAX_ID
from chatd.hub.fanout.sweep import EVERY
from chatd.observe import logs
from chatd.store import maintenance
from chatd.store.files import file_of
from chatd.store.upkeep import copies
from chatd.store.upkeep.retention import Rules

ID = click.IntRange(1, MAX_ID)
FILE = click.Path(path_type=Path)


class NewFile(click.Path):
    """A path for a new file, or a directory for it. A path that ends with `/` must be an existing directory."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, str) and value.endswith(os.sep) and not Path(value).is_dir():
            self.fail(f"there is no directory {value} Create it first, or give the path of a file.", param, ctx)
        return super().convert(value, param, ctx)


NEW_FILE = NewFile(path_type=Path)
LOOK_EVERY = 0.5  # seconds between two updates of the progress line
# Seconds after which a running daemon's sweep has closed the connections with void tokens.
GONE_AFTER = EVERY + 2.0
WAIT_HELP = "Seconds to wait until the user's connections have ended; 0 if chatd does not run."


def settings_of(path: Path | None) -> config.Config:
    settings = config.load(path, require_token=False)
    logs.configure("warning", settings.logs.format)
    return settings


@main.command()
@click.argument("target", type=NEW_FILE)
@with_config
def backup(path: Path | None, target: Path) -> None:
    """Copy the database to a file, or into a directory, while chatd serves.

    The copy is compact, has the state of one moment, and is checked. Only you can read it. This works for
    SQLite. For PostgreSQL use pg_dump.
    """
    settings = settings_of(path)
    _tidy_up_when_terminated()
    if target.is_dir():
        target /= f"chatd-{datetime.now(UTC):%Y%m%dT%H%M%SZ}.db"
    began = monotonic()
    with _growing(target, file_of(settings.database.url)):
        maintenance.backup(settings.database, target)
    size = target.stat().st_size / 2**20
    click.echo(f"{target}: {size:,.1f} MiB in {monotonic() - began:.1f} s, checked.")


@main.command()
@click.argument("source", type=FILE, required=False)
@click.option(
    "--new-epoch",
    is_flag=True,
    help="After a restore with PostgreSQL's own tools: make clients without marks start over.",
)
@with_config
def restore(path: Path | None, source: Path | None, new_epoch: bool) -> None:
    """Replace the database by a backup. Stop chatd first. The old database is kept beside the new one.

    Clients that reconnect start over (`recovered: false`), unless their mark proves that the backup has
    everything that they have seen.
    """
    settings = settings_of(path)
    if new_epoch == (source is not None):
        raise click.UsageError("Give the path of the backup, or --new-epoch after PostgreSQL's own restore.")
    _tidy_up_when_terminated()
    if source is None:
        maintenance.new_epoch(settings.database)
        click.echo("Clients without marks will start over at their next connection. Restart chatd now.")
        return
    kept = maintenance.restore(settings.database, source)
    click.echo(f"Restored {source}." + (f" The old database is now {kept}." if kept else ""))


@main.command()
@click.option(
    "--older-than",
    "days",
    type=click.FloatRange(0, 36_500),
    help="Remove messages older than this number of days, instead of retention.days.",
)
@click.option(
    "--keep",
    "messages",
    type=click.IntRange(0, MAX_ID),
    help="Keep this number of messages of each room, instead of retention.messages.",
)
@click.option("--dry-run", is_flag=True, help="Only count the messages that would be removed.")
@with_config
def prune(path: Path | None, days: float | None, messages: int | None, dry_run: bool) -> None:
    """Remove old messages now, in small transactions, while chatd serves.

    A value of 0 switches that rule off.
    """
    settings = settings_of(path)
    kept = settings.retention
    rules = Rules(kept.days if days is None else days, kept.messages if messages is None else messages)
    if not rules:
        raise OperatorError("Nothing to do: set [retention], or give --older-than or --keep.")

    def tell(done: int, all: int) -> None:
        _progress(f"{done:,} of {all:,} messages")

    count = maintenance.prune(settings.database, rules, tell, dry=dry_run)
    _progress("")
    click.echo(f"{count:,} messages would be removed." if dry_run else f"{count:,} messages were removed.")


@main.group()
def user() -> None:
    """Export or erase all data about one user."""


@user.command()
@click.argument("user_id", type=ID)
@click.option(
    "--output",
    type=NEW_FILE,
    help="Write to this new file, which only you can read, instead of standard output.",
)
@with_config
def export(path: Path | None, user_id: int, output: Path | None) -> None:
    """Print all rows about a user, one JSON object on each line. `table` names the table of the row."""
    rows = maintenance.exported(settings_of(path).database, user_id)
    lines = (msgspec.json.encode(row).decode() for row in rows)
    if output is None:
        for line in lines:
            click.echo(line)
        return
    try:
        output.touch(mode=0o600, exist_ok=False)
        with output.open("w") as file:
            count = sum(bool(file.write(f"{line}\n")) for line in lines)
    except OSError as error:
        raise OperatorError(f"{output}: {error.strerror}.") from error
    click.echo(f"{output}: {count:,} rows.")


@user.command()
@click.argument("user_id", type=ID)
@click.option("--yes", is_flag=True, help="Do not ask for confirmation.")
@click.option("--wait", type=click.FloatRange(0), default=GONE_AFTER, show_default=True, help=WAIT_HELP)
@click.option("--in-place", is_flag=True, help="Do not rewrite SQLite's file. A rewrite makes posts wait.")
@with_config
def erase(path: Path | None, user_id: int, yes: bool, wait: float, in_place: bool) -> None:
    """Erase what a user has written, and void the user's tokens. You cannot undo this.

    The user's messages become deleted messages, so that conversations have no gaps. chatd removes their
    content, and the user's reactions, receipts and memberships, also from chat.stream. It rewrites SQLite's
    file, so that no byte is left. With --in-place, older versions of edited messages may stay in the file.
    Clients see the messages disappear within seconds. Backups still have them.
    """
    settings = settings_of(path)
    if not yes:
        click.confirm(f"Erase everything of user {user_id}?", abort=True)
    redis = bool(settings.redis.url)

    def tell(done: int) -> None:
        _progress(f"{done:,} messages")

    def settle() -> None:
        _progress("Waiting until the user's connections have ended")
        sleep(wait)

    count, clean = maintenance.erase(settings.database, user_id, tell, settle, redis=redis, anew=not in_place)
    _progress("")
    entries = stream.erase(settings.redis, user_id) if redis else 0
    click.echo(f"Erased: {count:,} messages" + (f", {entries:,} entries of chat.stream." if redis else "."))
    if not clean:
        raise OperatorError(
            "SQLite's log is in use and may still have some of the bytes: run the command again later."
        )


def _tidy_up_when_terminated() -> None:
    """Handle SIGTERM, with which systemd stops a timer's job, like Ctrl-C, so that temporary files are
    removed.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def _progress(text: str) -> None:
    """Show a line that the next one overwrites. Nothing is printed if standard error is not a terminal."""
    if sys.stderr.isatty():
        click.echo(f"\r\033[K{text}", nl=False, err=True)


@contextmanager
def _growing(target: Path, source: Path | None) -> Iterator[None]:
    """Show the progress of a copy while the block makes it."""
    done, partial = threading.Event(), copies.partial_of(target)

    def look() -> None:
        while not done.wait(LOOK_EVERY):
            with suppress(OSError):  # the partial file does not exist yet, or was just renamed
                sizes = [file.stat().st_size / 2**20 for file in (partial, source or partial)]
                _progress(f"{sizes[0]:,.0f} MiB of at most {sizes[1]:,.0f}")

    looking = threading.Thread(target=look)
    looking.start()
    try:
        yield
    finally:
        done.set()
        looking.join()
        _progress("")
