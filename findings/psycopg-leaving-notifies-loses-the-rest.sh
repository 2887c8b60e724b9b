#!/usr/bin/env bash
# psycopg 3: `for notify in connection.notifies(): ... break` throws away what came in the same packet, for good.
#
# Versions: psycopg 3.3.9, PostgreSQL 15 (Debian 12).
# Guess:    notifications that were not looked at stay with the connection, and the next notifies() gives them, as it
#           does with those that came during another execute().
# Seen:     what comes during another execute() is kept, yes. But the generator takes all that is there at once and yields it one
#           by one: leave it after the first (break, return, an exception in the body, next()) and the others are gone.
# Output:
#   three at once, all taken:                                  ['room 1', 'room 2', 'room 3']
#   three that came during another execute():                  ['room 1', 'room 2', 'room 3']
#   three at once, the loop left after:                        ['room 1']
#     and what the next notifies() has:                        []
# Hurt:     who listens for "a message was stored in room N": one transaction notifies of three rooms, the body raises for the
#           first or the loop is left to fetch it, and two rooms stand still until their next message.
# Instead:  put notifications in a queue with connection.add_notify_handler(), or take all: list(connection.notifies(timeout=0)).
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
import sys, psycopg

listener, sender = psycopg.connect(sys.argv[1], autocommit=True), psycopg.connect(sys.argv[1])
listener.execute("LISTEN rooms")
seen = []


def notify():
    for room in ("room 1", "room 2", "room 3"):
        sender.execute("SELECT pg_notify('rooms', %s)", (room,))
    sender.commit()


def show(what, heard):
    seen.append(heard)
    print(f"{what:58} {heard}")


def first():
    for notification in listener.notifies(timeout=5):
        return notification.payload


def rest():
    return [notification.payload for notification in listener.notifies(timeout=2)]


notify()
show("three at once, all taken:", rest())
notify()
listener.execute("SELECT 1")
show("three that came during another execute():", rest())
notify()
show("three at once, the loop left after:", [first()])
show("  and what the next notifies() has:", rest())
three = ["room 1", "room 2", "room 3"]
sys.exit(seen != [three, three, ["room 1"], []])
PY
