#!/usr/bin/env bash
# statement_timeout does not bound a COMMIT, nor the commit of a single INSERT: deferred triggers and synchronous standbys take
# as long as they like. And pg_cancel_backend, which ends that wait, makes the COMMIT succeed.
#
# Versions: PostgreSQL 15 (Debian 12), psycopg 3.3.9.
# Guess:    COMMIT is a statement, so statement_timeout = 1 s ends it after 1 s with an error, and who is told so has not stored.
# Seen:     PostgreSQL turns the timer off before it commits. A deferred constraint trigger of 3 s, and a standby that does not
#           answer, hold the COMMIT (and the INSERT of autocommit) with no limit, and then it *succeeds*. Cancelling the wait for
#           the standby gives no error but a WARNING, which psycopg's commit() does not raise: it returns as from a full commit.
# Output:
#   SELECT pg_sleep(3)                           QueryCanceled  after 1 s   stored: 0   warnings: []
#   INSERT, autocommit, deferred trigger of 3 s  succeeds       after 3 s   stored: 1   warnings: []
#   COMMIT, deferred trigger of 3 s              succeeds       after 3 s   stored: 2   warnings: []
#   COMMIT, standby away, cancelled after 4 s    succeeds       after 4 s   stored: 3   warnings: ['WARNING']
# Hurt:     who answers "stored on two machines" when commit() returns, and who counts on statement_timeout to get the writer back
#           when the standby is gone: all writers hang, and an operator's cancel turns them into false promises.
# Instead:  a time limit of one's own outside (and the connection given up then, the outcome unknown); a notice handler that
#           looks for SQLSTATE 01000 at commit(); watch pg_stat_activity for wait_event = SyncRep.
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
pypi() { python3 -m pip install -q --no-compile --root-user-action=ignore --target "$work/lib" "$@" || exit 2; }
bin=/usr/lib/postgresql/15/bin
python3 -m pip --version >/dev/null 2>&1 || debian python3-pip
[ -x $bin/postgres ] || debian postgresql-15
pypi 'psycopg[binary]==3.3.9'
chmod 755 "$work" && install -d -o postgres "$work/server"
as() { cd / && exec setpriv --reuid postgres --regid postgres --init-groups "$@"; } # In a process of its own.
(as $bin/initdb -D "$work/server/data" -A trust --no-sync >/dev/null)
as $bin/postgres -D "$work/server/data" -k "$work/server" -c listen_addresses= -c fsync=off 2>"$work/log" & pids+=($!)
until $bin/pg_isready -qh "$work/server"; do sleep 0.2; done

PYTHONPATH=$work/lib python3 - "host=$work/server user=postgres dbname=postgres" <<'PY'
import sys, threading, time, psycopg

one, other = psycopg.connect(sys.argv[1], autocommit=True), psycopg.connect(sys.argv[1], autocommit=True)
one.execute("CREATE TABLE messages (text text)")
one.execute("CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN PERFORM pg_sleep(3); RETURN NULL; END'")
one.execute("CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON messages "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION slow()")
one.execute("SET statement_timeout = '1s'")
warned = []
one.add_notice_handler(lambda notice: warned.append(notice.severity_nonlocalized))
seen = []


def show(what, call):
    began = time.monotonic()
    try:
        call()
        said = "succeeds"
    except psycopg.Error as error:
        said = type(error).__name__
    seconds = round(time.monotonic() - began)
    stored = other.execute("SELECT count(*) FROM messages").fetchone()[0]
    seen.append((said, seconds >= 3, stored, bool(warned)))
    print(f"{what:44} {said:14} after {seconds} s   stored: {stored}   warnings: {warned}")


def insert():
    one.execute("INSERT INTO messages VALUES ('Hello')")


show("SELECT pg_sleep(3)", lambda: one.execute("SELECT pg_sleep(3)"))
show("INSERT, autocommit, deferred trigger of 3 s", insert)
one.autocommit = False
insert()
show("COMMIT, deferred trigger of 3 s", one.commit)
other.execute("DROP TRIGGER slow ON messages")
other.execute("ALTER SYSTEM SET synchronous_standby_names = 'away'")
other.execute("SELECT pg_reload_conf()")
time.sleep(1)
insert()
cancel = threading.Timer(4, other.execute, ("SELECT pg_cancel_backend(%s)", (one.info.backend_pid,)))
cancel.start()
show("COMMIT, standby away, cancelled after 4 s", one.commit)
sys.exit(seen != [("QueryCanceled", False, 0, False), ("succeeds", True, 1, False), ("succeeds", True, 2, False),
                  ("succeeds", True, 3, True)])
PY
