#!/usr/bin/env bash
# MariaDB: "INSERT IGNORE, then SELECT … FOR UPDATE" of a row that is there deadlocks two writers every time;
# "ON DUPLICATE KEY UPDATE id = id" never does.
#
# Versions: MariaDB 10.11 (Debian 12), PyMySQL 1.2.4, READ COMMITTED.
# Guess:    INSERT IGNORE of a row that exists does nothing, so two writers that then lock the row wait for each other in turn, as
#           with ON CONFLICT DO NOTHING in PostgreSQL.
# Seen:     the ignored INSERT leaves a *shared* lock on the row it met. Both writers get one, both want the exclusive one, and one is
#           killed with 1213. The row is the more often there, the older the system is. With ON DUPLICATE KEY UPDATE, which takes the
#           exclusive lock at once, and with a new row, both succeed.
# Output:
#   INSERT IGNORE, the row is there                  error 1213 and stored
#   INSERT IGNORE, the row is there                  error 1213 and stored
#   INSERT IGNORE, the row is there                  error 1213 and stored
#   ON DUPLICATE KEY UPDATE, the row is there        stored and stored
#   ON DUPLICATE KEY UPDATE, the row is there        stored and stored
#   ON DUPLICATE KEY UPDATE, the row is there        stored and stored
#   INSERT IGNORE, a new row                         stored and stored
# Hurt:     "make the room if it is missing, then count its message" with more than one writer: in tests with new rooms all is well,
#           in production half of the concurrent posts to a busy room are deadlocks.
# Instead:  INSERT … ON DUPLICATE KEY UPDATE id = id, or SELECT … FOR UPDATE first and INSERT only when nothing came; and retry 1213.
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
pypi() { python3 -m pip install -q --no-compile --root-user-action=ignore --target "$work/lib" "$@" || exit 2; }
python3 -m pip --version >/dev/null 2>&1 || debian python3-pip
[ -x /usr/sbin/mariadbd ] || debian mariadb-server
pypi pymysql==1.2.4
chmod 755 "$work" && install -d -o mysql "$work/server"
mariadb-install-db --no-defaults --user=mysql --datadir="$work/server/data" --auth-root-authentication-method=normal \
    --skip-test-db --tmpdir="$work/server" >/dev/null 2>&1
/usr/sbin/mariadbd --no-defaults --user=mysql --datadir="$work/server/data" --socket="$work/server/socket" --skip-networking \
    --pid-file="$work/server/pid" --tmpdir="$work/server" 2>"$work/log" & pids+=($!)
until mariadb-admin --no-defaults -S "$work/server/socket" -uroot ping >/dev/null 2>&1; do sleep 0.2; done

PYTHONPATH=$work/lib python3 - "$work/server/socket" <<'PY'
import sys, threading, pymysql

IGNORE = "INSERT IGNORE INTO rooms (id) VALUES (%s)"
UPDATE = "INSERT INTO rooms (id) VALUES (%s) ON DUPLICATE KEY UPDATE id = id"


def connect():
    connection = pymysql.connect(unix_socket=sys.argv[1], user="root", database="chat")
    with connection.cursor() as cursor:
        cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
    return connection


with pymysql.connect(unix_socket=sys.argv[1], user="root", autocommit=True).cursor() as cursor:
    cursor.execute("CREATE DATABASE chat")
    cursor.execute("CREATE TABLE chat.rooms (id BIGINT PRIMARY KEY, messages INT NOT NULL DEFAULT 0)")
    cursor.execute("INSERT INTO chat.rooms (id) VALUES (1), (2), (3), (4), (5), (6)")


def count(connection, statement, room, met, outcomes):
    try:
        with connection.cursor() as cursor:
            cursor.execute(statement, (room,))
            met.wait(2)
            cursor.execute("SELECT messages FROM rooms WHERE id = %s FOR UPDATE", (room,))
            cursor.execute("UPDATE rooms SET messages = messages + 1 WHERE id = %s", (room,))
        connection.commit()
        outcomes.append("stored")
    except pymysql.OperationalError as error:
        connection.rollback()
        outcomes.append(f"error {error.args[0]}")


class Meeting(threading.Barrier):
    """Both have done their INSERT; or one is still kept from it by the other's lock, and that one goes on alone."""

    def wait(self, seconds):
        try:
            super().wait(seconds)
        except threading.BrokenBarrierError:
            pass


def two_writers(what, statement, rooms):
    for room in rooms:
        outcomes, met = [], Meeting(2)
        writers = [threading.Thread(target=count, args=(connect(), statement, room, met, outcomes)) for _ in range(2)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        seen.setdefault(what, []).append(sorted(outcomes))
        print(f"{what:48} {' and '.join(sorted(outcomes))}")


seen = {}
two_writers("INSERT IGNORE, the row is there", IGNORE, (1, 2, 3))
two_writers("ON DUPLICATE KEY UPDATE, the row is there", UPDATE, (4, 5, 6))
two_writers("INSERT IGNORE, a new row", IGNORE, (7,))
deadlock, fine = ["error 1213", "stored"], ["stored", "stored"]
sys.exit(list(seen.values()) != [[deadlock] * 3, [fine] * 3, [fine]])
PY
