#!/usr/bin/env bash
# `sqlite3 chat.db ".backup copy.db"` never ends while another process commits some fifty times a second.
#
# Versions: the sqlite3 command and library 3.40.1 (Debian 12), Python 3.11's sqlite3.
# Guess:    .backup is the safe way to copy a live database in WAL mode: readers do not block writers, and it takes a little
#           longer under load.
# Seen:     the command copies 100 pages a step and lets go of its snapshot between the steps; each commit of another process
#           makes it begin again. With up to 50 commits/s a database of 160 MB is not copied in 15 s (1 to 3 s when it is quiet),
#           and nothing is said. VACUUM INTO, and Python's backup() as it is by default (all pages in one step), are not disturbed.
# Output:
#   no writer:     .backup                       done
#   with a writer: .backup                       not done after 15 s
#   with a writer: VACUUM INTO                   done
#   with a writer: sqlite3.Connection.backup()   done
# Hurt:     nightly backups by cron: they work for months, then the database has grown beyond what fits between two commits, the
#           job hangs until the traffic stops, and the next ones pile up behind it.
# Instead:  sqlite3 chat.db "VACUUM INTO 'copy.db'", or sqlite3.Connection.backup() without `pages`.
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
command -v python3 >/dev/null || debian python3
command -v sqlite3 >/dev/null || debian sqlite3
python3 - "$work" <<'PY'
import sqlite3, subprocess, sys, threading, time

folder = sys.argv[1]
database = f"{folder}/chat.db"
made = sqlite3.connect(database, isolation_level=None)
made.execute("PRAGMA journal_mode=wal")
made.execute("CREATE TABLE messages (text)")
made.execute("WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n WHERE x < 40000) "
             "INSERT INTO messages SELECT randomblob(3900) FROM n")
made.close()
stop = threading.Event()


def write():
    writer = sqlite3.connect(database, isolation_level=None, timeout=30)
    while not stop.wait(0.02):
        writer.execute("INSERT INTO messages VALUES ('Hello')")


def in_time(copy, seconds=15):
    try:
        copy(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def command(line):
    return lambda seconds: subprocess.run(["sqlite3", database, line], check=True, timeout=seconds)


def api(_):
    source, target = sqlite3.connect(database), sqlite3.connect(f"{folder}/api.db")
    source.backup(target)


seen = []


def show(what, copy):
    seen.append(in_time(copy))
    print(f"{what:44} {'done' if seen[-1] else 'not done after 15 s'}")


show("no writer:     .backup", command(f".backup {folder}/quiet.db"))
writing = threading.Thread(target=write)
writing.start()
try:
    show("with a writer: .backup", command(f".backup {folder}/busy.db"))
    show("with a writer: VACUUM INTO", command(f"VACUUM INTO '{folder}/vacuum.db'"))
    show("with a writer: sqlite3.Connection.backup()", api)
finally:
    stop.set()
    writing.join()
sys.exit(seen != [True, False, True, True])
PY
