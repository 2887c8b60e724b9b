#!/usr/bin/env bash
# Through PgBouncer connect() succeeds at once while PostgreSQL hangs, and the first query waits, past connect_timeout.
#
# Versions: PgBouncer 1.18.0, PostgreSQL 15 (Debian 12), psycopg 3.3.9.
# Guess:    connect_timeout = 2 guards against a database that hangs, with PgBouncer as without: connecting fails after 2 s.
# Seen:     PgBouncer answers the login itself, from what it remembers of PostgreSQL, so connect() takes no time; the query is then
#           sent into a connection that nobody answers. Nothing ends that by default: query_timeout is 0, statement_timeout is
#           PostgreSQL's own, and the connection to PgBouncer is healthy, so neither keepalive nor tcp_user_timeout help.
# Output:
#   PostgreSQL hangs, connect()            ConnectionTimeout  after 2 s
#   the same through PgBouncer, connect()  succeeds           at once
#       and then SELECT 1                  no answer          after 15 s
# Hurt:     health checks and pools that count connect() as proof, and "SELECT 1" before use (pool_pre_ping): with PostgreSQL stopped
#           by its disk or its machine, every thread of the application hangs there.
# Instead:  a limit of one's own around the first query; query_timeout in pgbouncer.ini above one's longest query.
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
[ -x /usr/sbin/pgbouncer ] || debian pgbouncer
pypi 'psycopg[binary]==3.3.9'
chmod 755 "$work" && install -d -o postgres "$work/server"
as() { cd / && exec setpriv --reuid postgres --regid postgres --init-groups "$@"; } # In a process of its own.
(as $bin/initdb -D "$work/server/data" -A trust --no-sync >/dev/null)
as $bin/postgres -D "$work/server/data" -k "$work/server" -c listen_addresses= -c fsync=off 2>"$work/log" & pids+=($!)
until $bin/pg_isready -qh "$work/server"; do sleep 0.2; done
cat >"$work/server/pgbouncer.ini" <<INI
[databases]
postgres = host=$work/server
[pgbouncer]
unix_socket_dir = $work/server
listen_addr =
listen_port = 6432
auth_type = trust
auth_file = $work/server/users
pool_mode = transaction
INI
echo '"postgres" ""' >"$work/server/users"
as /usr/sbin/pgbouncer -q "$work/server/pgbouncer.ini" 2>"$work/pgbouncer.log" & pids+=($!)
until [ -S "$work/server/.s.PGSQL.6432" ]; do sleep 0.2; done

PYTHONPATH=$work/lib python3 - "$work/server" <<'PY'
import os, signal, sys, threading, time, psycopg

folder = sys.argv[1]
seen = []
with open(f"{folder}/data/postmaster.pid") as file:
    postmaster = int(file.readline())
with open(f"/proc/{postmaster}/task/{postmaster}/children") as file:
    hanging = [postmaster, *map(int, file.read().split())]


def show(what, call, limit):
    outcome = []

    def run():
        try:
            call()
            outcome.append("succeeds")
        except psycopg.Error as error:
            outcome.append(type(error).__name__)

    began = time.monotonic()
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(limit)
    said = outcome[0] if outcome else "no answer"
    seen.append(said)
    print(f"{what:38} {said:18} {'at once' if time.monotonic() - began < 1 else f'after {time.monotonic() - began:.0f} s'}")


def connect(port):
    return psycopg.connect(f"host={folder} port={port} user=postgres dbname=postgres connect_timeout=2", autocommit=True)


with connect(6432) as warm:
    warm.execute("SELECT 1")
with open(f"/proc/{postmaster}/task/{postmaster}/children") as file:
    hanging = [postmaster, *map(int, file.read().split())]
for process in hanging:
    os.kill(process, signal.SIGSTOP)
try:
    show("PostgreSQL hangs, connect()", lambda: connect(5432), 20)
    through = []
    show("the same through PgBouncer, connect()", lambda: through.append(connect(6432)), 20)
    show("    and then SELECT 1", lambda: through[0].execute("SELECT 1"), 15)
finally:
    for process in hanging:
        os.kill(process, signal.SIGCONT)
sys.stdout.flush()
os._exit(seen != ["ConnectionTimeout", "succeeds", "no answer"])
PY
