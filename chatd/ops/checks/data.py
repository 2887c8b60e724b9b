"""The database, the directory of SQLite's file, and Redis."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from chatd.bus import probe as bus_probe
from chatd.core.errors import OperatorError
from chatd.ops.finding import Case, Finding, ok, others_may, problem, warning
from chatd.store.engine import WRITING_SESSIONS
from chatd.store.upkeep import probe as store_probe

SLOW_COMMIT = 0.02  # seconds; a disk of today takes under 5 ms, and a group of messages waits for one commit
SLOW_PING = 0.005
CLOCKS_APART, CLOCKS_FAR_APART = 1.0, 5.0  # seconds
OLDEST_POSTGRES, OLDEST_REDIS = 13, (6, 2)
WAL_BYTES = 256 * 1024 * 1024  # SQLite keeps it at 4 MiB unless somebody reads without an end
FREE_BYTES, LITTLE_BYTES = 100 * 1024 * 1024, 1024 * 1024 * 1024
NETWORK_FILE_SYSTEMS = {"nfs", "nfs4", "cifs", "smb3", "9p", "fuse.sshfs", "ceph", "glusterfs"}
FULL = 0.8  # of Redis's maxmemory
RESTORE = "Stop chatd, and put a backup in its place: `chatd restore`. What goes on may damage more."
DATABASE, DIRECTORY, REDIS = "database", "directory", "Redis"


def database(case: Case) -> Iterator[Finding]:
    """Reachable, of the right version and schema, writable, fast."""
    try:
        found = store_probe.look(case.config.database)
    except store_probe.Damaged as error:
        yield problem(DATABASE, f"the file is damaged: {error}", RESTORE)
        return
    except OperatorError as error:
        yield problem(
            DATABASE,
            f"{error}",
            "See database.url, and whether a server runs there that takes writes; serve makes SQLite's file.",
        )
        return
    yield _schema(found)
    if found.refuses_writes:
        yield problem(
            DATABASE,
            f"takes no rows: {found.refuses_writes}",
            "See the rights of its user, its free space, and whether another process holds it.",
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
            "Run `chatd migrate`; if the schema is newer, install that chatd.",
        )
    number = found.version.removeprefix("PostgreSQL ").partition(".")[0]
    if found.version.startswith("PostgreSQL") and number.isdecimal() and int(number) < OLDEST_POSTGRES:
        return warning(DATABASE, f"{found.version} is old", f"Take PostgreSQL {OLDEST_POSTGRES} or newer.")
    takes = "" if found.refuses_writes else ", takes rows"
    return ok(DATABASE, f"{found.version}, schema at version {found.revision}{takes}")


def _damage(damage: str | None) -> Finding:
    """Of SQLite's file."""
    if damage:
        return problem(DATABASE, f"the file is damaged: {damage}", RESTORE)
    if damage is None:
        advice = "`sqlite3 FILE 'PRAGMA quick_check'` reads all of it, beside a chatd that serves."
        return ok(
            DATABASE, f"no damage found in {store_probe.CHECK_SECONDS:.0f} s, which were not enough", advice
        )
    return ok(DATABASE, "the file is whole")


def _commit(seconds: float) -> Finding:
    text = f"a commit is on the disk in {seconds * 1000:.1f} ms"
    if seconds < SLOW_COMMIT:
        return ok(DATABASE, text)
    return warning(
        DATABASE,
        f"{text}: each message waits for one, though not for one of its own",
        "Put the database on a local disk, best an SSD with power-loss protection.",
    )


def _settings(case: Case, settings: dict[str, str]) -> Iterator[Finding]:
    """PostgreSQL's. synchronous_commit is what chatd's own sessions have."""
    off = [name for name in ("fsync", "full_page_writes", "synchronous_commit") if settings.get(name) == "off"]
    if off:
        yield problem(
            DATABASE,
            f"{' and '.join(off)} off: a power cut takes messages that were acknowledged, or the database",
            f"Set {', '.join(f'{name} = on' for name in off)} in postgresql.conf, and reload it.",
        )
    needed = (case.config.database.readers + WRITING_SESSIONS) * case.config.server.workers
    if settings and int(settings["max_connections"]) < needed + 3:  # three are for superusers
        yield problem(
            DATABASE,
            f"max_connections is {settings['max_connections']}; this node alone may need {needed}",
            "Raise it in postgresql.conf, or lower database.readers or server.workers.",
        )


def _standbys(synchronous: str, count: int) -> Iterator[Finding]:
    """What a failover would cost. Which standby is which only a superuser may see."""
    if synchronous and not count:
        yield problem(
            DATABASE,
            f"no standby follows, and each message waits for one ({store_probe.SYNCHRONOUS} = '{synchronous}')",
            "Start the standby; or take the setting back, and nothing waits for one.",
        )
    elif synchronous:
        yield ok(DATABASE, "commits wait for a standby: a failover to it loses nothing that was acknowledged")
    elif count:
        yield warning(
            DATABASE,
            f"followed by {count} asynchronous: a failover may lose the newest messages that were acknowledged",
            f"Set {store_probe.SYNCHRONOUS}, unless that is meant to be; clients are told when it happens.",
        )


def database_directory(case: Case) -> Iterator[Finding]:
    """Of SQLite's file: room, a log that grows without end, and who may read it."""
    file = store_probe.sqlite_file(case.config.database)
    if file is None or not file.parent.is_dir():
        return
    yield from _space(file.parent)
    kind = _file_system(file.parent)
    if kind in NETWORK_FILE_SYSTEMS:
        yield problem(DIRECTORY, f"{file.parent} is on {kind}", "SQLite's locks need a disk of this host.")
    log = file.with_name(file.name + "-wal")
    if log.exists() and log.stat().st_size > WAL_BYTES:
        yield warning(
            DIRECTORY,
            f"{log} has {_size(log.stat().st_size)}: something reads the database without an end",
            "Find it (fuser, lsof: a forgotten shell, a backup that hangs), and end it.",
        )
    if file.exists():
        yield _rights(file)


def _space(directory: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(directory).free
    text = f"{directory} has {_size(free)} free"
    if free < FREE_BYTES:
        yield problem(DIRECTORY, text, "Make room: without it no message can be stored.")
    elif free < LITTLE_BYTES:
        yield warning(DIRECTORY, text, "Make room before it is needed.")
    else:
        yield ok(DIRECTORY, text)


def _rights(file: Path) -> Finding:
    """It holds every message, and the secret that signs tokens."""
    mode = stat.filemode(file.stat().st_mode)
    if others_may(file, stat.S_IROTH | stat.S_IWOTH):
        return problem(
            DIRECTORY,
            f"everybody here can read {file} ({mode}): the messages, and what signs tokens",
            f"chmod o= {file}*, or chmod 700 {file.parent}",
        )
    if not os.access(file, os.W_OK) or not os.access(file.parent, os.W_OK):
        return problem(
            DIRECTORY, f"this user cannot write {file}", "Run this as the user that runs chatd, or chown it."
        )
    return ok(DIRECTORY, f"{file.name} is closed to others ({mode})")


def _file_system(directory: Path) -> str:
    """Its kind, of the innermost mount."""
    try:
        mounts = [line.split()[1:3] for line in Path("/proc/mounts").read_text().splitlines()]
    except OSError:
        return ""
    above = [(len(point), kind) for point, kind in mounts if directory.is_relative_to(point)]
    return max(above, default=(0, ""))[1]


def redis(case: Case) -> Iterator[Finding]:
    """Reachable, new enough, near, and allowed to forget nothing."""
    if not case.config.redis.url:
        yield ok(REDIS, "none: this process serves everybody itself")
        return
    try:
        found = bus_probe.look(case.config.redis)
    except OperatorError as error:
        yield problem(
            REDIS,
            f"does not answer: {error}",
            "Start it, or see redis.url. Until then each node serves its own clients alone.",
        )
        return
    version = tuple(int(part) for part in found.version.split(".")[:2])
    if version < OLDEST_REDIS:
        yield problem(REDIS, f"is version {found.version}", "Take 6.2 or newer: chat.ingest needs XAUTOCLAIM.")
    elif found.replica:
        yield problem(REDIS, "is a replica, which takes no writes", "Name its master in redis.url.")
    else:
        yield _latency(found)
    yield _memory(found)
    yield from _clock("Redis", found.ahead)


def _latency(found: bus_probe.Found) -> Finding:
    text = f"version {found.version}, answers in {found.ping * 1000:.2f} ms"
    if found.ping < SLOW_PING:
        keeps = "keeps an append-only file" if found.persists else "keeps nothing over a restart"
        advice = (
            "" if found.persists else "chatd needs no more; chat.ingest and consumer groups do: appendonly yes"
        )
        return ok(REDIS, f"{text}, {keeps}", advice)
    return warning(REDIS, f"{text}, which is slow", "Put it near, and see SLOWLOG GET and what else uses it.")


def _memory(found: bus_probe.Found) -> Finding:
    if not found.most_memory:
        return ok(REDIS, f"uses {_size(found.memory)}, without a limit")
    text = f"uses {_size(found.memory)} of {_size(found.most_memory)}"
    if found.policy != "noeviction":
        return problem(
            REDIS,
            f"{text}, and may throw away streams when that is full (maxmemory-policy {found.policy})",
            "CONFIG SET maxmemory-policy noeviction, and the same in redis.conf",
        )
    if found.memory > FULL * found.most_memory:
        return warning(
            REDIS, f"{text}: it will refuse writes soon", "Raise maxmemory, or lower redis.stream_length."
        )
    return ok(REDIS, f"{text}, noeviction")


def _clock(whose: str, ahead: float) -> Iterator[Finding]:
    text = f"{whose}'s is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} ours"
    advice = "Synchronize both hosts (timedatectl, chrony)."
    if abs(ahead) > CLOCKS_FAR_APART:
        yield problem("clock", text, advice)
    elif abs(ahead) > CLOCKS_APART:
        yield warning("clock", text, advice)
    else:
        yield ok("clock", f"{whose}'s is the same as ours")


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
