"""Checks of the database, of the directory of SQLite's file, and of Redis."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from chatd.bus import probe as bus_probe
from chatd.bus import rights
from chatd.config import Redis
from chatd.core.errors import OperatorError
from chatd.ops.finding import Case, Finding, ok, others_may, problem, warning
from chatd.store.engine import WRITING_SESSIONS
from chatd.store.files import beside, file_of
from chatd.store.upkeep import probe as store_probe

SLOW_COMMIT = 0.02  # seconds; a current disk takes less than 5 ms. A group of messages waits for one commit.
SLOW_PING = 0.005  # seconds
CLOCKS_APART, CLOCKS_FAR_APART = 1.0, 5.0  # seconds
OLDEST_POSTGRES, OLDEST_REDIS = 13, (6, 2)
WAL_BYTES = 256 * 1024 * 1024  # the log stays at about 4 MiB, unless a reader keeps a transaction open
FREE_BYTES, LITTLE_BYTES = 100 * 1024 * 1024, 1024 * 1024 * 1024
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"}
FULL = 0.8  # the share of Redis's maxmemory above which there is a warning
RESTORE = "Stop chatd, because further writes may damage more, and replace the file: `chatd restore BACKUP`."
DATABASE, DIRECTORY, REDIS = "database", "directory", "Redis"


def database(case: Case) -> Iterator[Finding]:
    """Whether the database is reachable, has the right version and schema, accepts writes, and is fast."""
    try:
        found = store_probe.look(case.config.database)
    except store_probe.Damaged as error:
        yield problem(DATABASE, f"the file is damaged: {error}", RESTORE)
        return
    except OperatorError as error:
        yield problem(
            DATABASE,
            f"{error}",
            "Check database.url, and that a server runs there which accepts writes. For SQLite, `chatd serve` "
            "creates the file.",
        )
        return
    yield _schema(found)
    if found.refuses_writes:
        yield problem(
            DATABASE,
            f"does not accept writes: {found.refuses_writes}",
            "Check the rights of its user, its free space, and whether another process locks it.",
        )
    if found.settings is None:
        yield _damage(found.damage)
    if found.commit is not None:
        yield _commit(found.commit)
    yield from _settings(case, found.settings or {})
    if found.settings:
        yield from _standbys(found.settings[store_probe.SYNCHRONOUS], found.standbys)
    if found.ahead is not None:
        yield from _clock("PostgreSQL", found.ahead)


def _schema(found: store_probe.Found) -> Finding:
    if found.revision != found.newest:
        has = f"version {found.revision}" if found.revision else "none"
        return problem(
            DATABASE,
            f"{found.version}, schema: {has}; this chatd needs {found.newest}",
            "Run `chatd migrate`. If the schema is newer, install the chatd of that version.",
        )
    number = found.version.removeprefix("PostgreSQL ").partition(".")[0]
    if found.version.startswith("PostgreSQL") and number.isdecimal() and int(number) < OLDEST_POSTGRES:
        return warning(DATABASE, f"{found.version} is too old", f"Use PostgreSQL {OLDEST_POSTGRES} or newer.")
    writes = "" if found.refuses_writes else ", accepts writes"
    return ok(DATABASE, f"{found.version}, schema at version {found.revision}{writes}")


def _damage(damage: str | None) -> Finding:
    """Report damage of SQLite's file."""
    if damage:
        return problem(DATABASE, f"the file is damaged: {damage}", RESTORE)
    if damage is None:
        advice = "`sqlite3 FILE 'PRAGMA quick_check'` checks all of it, also while chatd serves."
        seconds = f"{store_probe.CHECK_SECONDS:.0f} s"
        return ok(DATABASE, f"no damage found in {seconds}, which was too short to check all of it", advice)
    return ok(DATABASE, "the file is intact")


def _commit(seconds: float) -> Finding:
    text = f"a commit reaches the disk in {seconds * 1000:.1f} ms"
    if seconds < SLOW_COMMIT:
        return ok(DATABASE, text)
    return warning(
        DATABASE,
        f"{text}: each message waits for one, which it shares with others",
        "Put the database on a local disk, best an SSD with power-loss protection.",
    )


def _settings(case: Case, settings: dict[str, str]) -> Iterator[Finding]:
    """Check PostgreSQL's settings. `synchronous_commit` is the value in chatd's own sessions."""
    off = [name for name in ("fsync", "full_page_writes", "synchronous_commit") if settings.get(name) == "off"]
    if off:
        yield problem(
            DATABASE,
            f"{' and '.join(off)} off: a power cut may destroy acknowledged messages, or the whole database",
            f"Set {', '.join(f'{name} = on' for name in off)} in postgresql.conf, and reload it.",
        )
    needed = (case.config.database.readers + WRITING_SESSIONS) * case.config.server.workers
    if settings and int(settings["max_connections"]) < needed + 3:  # PostgreSQL reserves 3 for superusers
        yield problem(
            DATABASE,
            f"max_connections is {settings['max_connections']}; this node alone may need {needed}",
            "Raise it in postgresql.conf, or lower database.readers or server.workers.",
        )


def _standbys(synchronous: str, count: int) -> Iterator[Finding]:
    """Report which messages a failover may lose. Only a superuser may see which standby is synchronous."""
    if synchronous and not count:
        yield problem(
            DATABASE,
            f"messages wait for a standby, and none is there ({store_probe.SYNCHRONOUS} = '{synchronous}')",
            "Start the standby, or remove the setting.",
        )
    elif synchronous:
        yield ok(DATABASE, "commits wait for a standby: a failover to it loses no acknowledged message")
    elif count:
        yield warning(
            DATABASE,
            f"has only asynchronous standbys ({count}): a failover may lose the newest acknowledged messages",
            f"Set {store_probe.SYNCHRONOUS}, unless you accept that. Clients learn of such a loss.",
        )


def database_directory(case: Case) -> Iterator[Finding]:
    """Whether the directory of SQLite's file has free space and a small log, and who can read the file."""
    file = file_of(case.config.database.url)
    if file is None or not file.parent.is_dir():
        return
    yield from _space(file.parent)
    kind = _file_system(file.parent)
    if kind in NETWORK_FILE_SYSTEMS:
        yield problem(DIRECTORY, f"{file.parent} is on {kind}", "SQLite's locks need a local disk.")
    log = beside(file, "-wal")
    if log.exists() and log.stat().st_size > WAL_BYTES:
        yield warning(
            DIRECTORY,
            f"{log} has {_size(log.stat().st_size)}: a process keeps a read transaction open",
            "Find and end it (fuser, lsof): it may be a forgotten shell, or a backup that hangs.",
        )
    if file.exists():
        yield _rights(file)


def _space(directory: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(directory).free
    text = f"{directory} has {_size(free)} free"
    if free < FREE_BYTES:
        yield problem(DIRECTORY, text, "Free some space: without it chatd cannot store messages.")
    elif free < LITTLE_BYTES:
        yield warning(DIRECTORY, text, "Free some space before the disk is full.")
    else:
        yield ok(DIRECTORY, text)


def _rights(file: Path) -> Finding:
    """Check who can read the file: it has all messages, and the secret that signs tokens."""
    mode = stat.filemode(file.stat().st_mode)
    if others_may(file, stat.S_IROTH | stat.S_IWOTH):
        return problem(
            DIRECTORY,
            f"every user of this machine can read {file} ({mode}): the messages, and the secret for tokens",
            f"chmod o= {file}*, or chmod 700 {file.parent}",
        )
    if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
        return problem(
            DIRECTORY, f"this user cannot write {file}", "Run this as the user that runs chatd, or chown it."
        )
    return ok(DIRECTORY, f"other users cannot read {file.name} ({mode})")


def _file_system(directory: Path) -> str:
    """Return the file system's type, such as ext4, of the innermost mount."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    above = [(len(point), kind) for point, kind in mounts if directory.is_relative_to(point)]
    return max(above, default=(0, ""))[1]


def redis(case: Case) -> Iterator[Finding]:
    """Whether Redis is reachable, new enough and fast, and evicts no keys."""
    if not case.config.redis.url:
        yield ok(REDIS, "not configured: a single node needs none")
        return
    try:
        missing = bus_probe.missing_rights(case.config.redis)
        yield from _rights_in_redis(case.config.redis, missing)
        if "+info" in missing:
            return
        found = bus_probe.look(case.config.redis)
    except bus_probe.Refused as error:
        yield problem(
            REDIS, f"refuses chatd: {error}", "Check the user, the password and the database in redis.url."
        )
        return
    except OperatorError as error:
        yield problem(
            REDIS,
            f"does not answer: {error}",
            "Start it, or check redis.url. Until then clients get other nodes' messages late.",
        )
        return
    version = tuple(int(part) for part in found.version.split(".")[:2])
    if version < OLDEST_REDIS:
        yield problem(REDIS, f"is version {found.version}", "Use 6.2 or newer: chat.ingest needs XAUTOCLAIM.")
    elif found.replica:
        yield problem(REDIS, "is a replica, which accepts no writes", "Put its master into redis.url.")
    else:
        yield _latency(found)
    yield _memory(found)
    yield from _clock("Redis", found.ahead)


def _rights_in_redis(config: Redis, missing: list[str]) -> Iterator[Finding]:
    if missing:
        yield problem(
            REDIS,
            f"does not give its user these rights: {' '.join(missing)}",
            f"ACL SETUSER {rights.user(config)} {' '.join(missing)}",
        )


def _latency(found: bus_probe.Found) -> Finding:
    text = f"version {found.version}, answers in {found.ping * 1000:.2f} ms"
    if found.ping < SLOW_PING:
        keeps = "has an append-only file" if found.persists else "loses its data at a restart"
        advice = (
            ""
            if found.persists
            else "That is enough for chatd itself. chat.ingest and consumer groups need appendonly yes."
        )
        return ok(REDIS, f"{text}, {keeps}", advice)
    return warning(
        REDIS, f"{text}, which is slow", "Run it near chatd, and check SLOWLOG GET and its other clients."
    )


def _memory(found: bus_probe.Found) -> Finding:
    if not found.most_memory:
        return ok(REDIS, f"uses {_size(found.memory)}, without a limit")
    text = f"uses {_size(found.memory)} of {_size(found.most_memory)}"
    if found.policy != "noeviction":
        return problem(
            REDIS,
            f"{text}, and may evict streams when its memory is full (maxmemory-policy {found.policy})",
            "CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
        )
    if found.memory > FULL * found.most_memory:
        return warning(
            REDIS, f"{text}: it will refuse writes soon", "Raise maxmemory, or lower redis.stream_length."
        )
    return ok(REDIS, f"{text}, noeviction")


def _clock(whose: str, ahead: float) -> Iterator[Finding]:
    text = f"the clock of {whose} is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's"
    advice = "Synchronize both hosts (timedatectl, chrony)."
    if abs(ahead) > CLOCKS_FAR_APART:
        yield problem("clock", text, advice)
    elif abs(ahead) > CLOCKS_APART:
        yield warning("clock", text, advice)
    else:
        yield ok("clock", f"the clock of {whose} agrees with this machine's")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
