#!/usr/bin/env bash
# An interrupted INSERT, or one for which there is no room, rolls back all that came before it, and the next commit() succeeds.
#
# Versions: SQLite 3.40.1 with Python 3.11's sqlite3 (Debian 12).
# Guess:    a statement that fails is undone alone, as with a constraint: the transaction is still open with what it had, and
#           commit() keeps it, or fails.
# Seen:     Connection.interrupt() during a write, and "database or disk is full", end the whole transaction at once. The driver
#           opens a new one for the next statement without a word, so commit() succeeds and stores the second half only.
#           An interrupted SELECT and a broken constraint leave the transaction alone.
# Output:
#   constraint           UNIQUE constraint failed: log.text    in_transaction: True   after commit(): ['first', 'third']
#   interrupted SELECT   interrupted                           in_transaction: True   after commit(): ['first', 'third']
#   interrupted INSERT   interrupted                           in_transaction: False  after commit(): ['third']
#   no room              database or disk is full              in_transaction: False  after commit(): ['third']
# Hurt:     who limits the time of statements with interrupt() or catches one failed row of a batch and goes on: the room is not
#           there, its first message is, and nobody was told.
# Instead:  after any OperationalError look at in_transaction; false means begin again from the first statement.
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
command -v python3 >/dev/null || debian python3
python3 - "$work" <<'PY'
import sqlite3, sys, threading

ENDLESS = "WITH RECURSIVE n(x) AS (VALUES (1) UNION ALL SELECT x + 1 FROM n)"
seen = []


def show(what, statement, argument=(), interrupted=False):
    connection = sqlite3.connect(f"{sys.argv[1]}/{len(seen)}.db", check_same_thread=False)
    connection.execute("PRAGMA max_page_count=2000")
    connection.execute("CREATE TABLE log (text UNIQUE)")
    connection.execute("INSERT INTO log VALUES ('first')")
    if interrupted:
        threading.Timer(0.3, connection.interrupt).start()
    try:
        connection.execute(statement, argument).fetchall()
    except sqlite3.Error as error:
        said = f"{error}"
    still = connection.in_transaction
    connection.execute("INSERT INTO log VALUES ('third')")
    connection.commit()
    kept = [text for text, in connection.execute("SELECT text FROM log ORDER BY rowid")]
    seen.append(kept)
    print(f"{what:20} {said:37} in_transaction: {still!s:6} after commit(): {kept}")


show("constraint", "INSERT INTO log VALUES ('first')")
show("interrupted SELECT", f"{ENDLESS} SELECT count(*) FROM n", interrupted=True)
show("interrupted INSERT", f"INSERT INTO log {ENDLESS} SELECT NULL FROM n LIMIT -1", interrupted=True)
show("no room", "INSERT INTO log VALUES (zeroblob(?))", (20_000_000,))
both, half = ["first", "third"], ["third"]
sys.exit(seen != [both, both, half, half])
PY
