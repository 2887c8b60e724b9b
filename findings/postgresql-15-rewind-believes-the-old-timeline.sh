#!/usr/bin/env bash
# After a promotion pg_rewind says "no rewind required" to a server that has diverged, and pg_control_checkpoint() tells the old
# timeline, for as long as the checkpoint takes: minutes.
#
# Versions: PostgreSQL 15 (Debian 12).
# Guess:    pg_promote() returned true and writes succeed, so the server is on its new timeline, whomever one asks.
# Seen:     the promotion ends without a checkpoint (one is begun, and spread over minutes like any other). Until it is done the
#           control file has the old timeline. pg_rewind trusts it: it compares 1 with 1 and exits 0 without doing anything, though
#           both servers have written. After a CHECKPOINT it does see where they parted.
# Output:
#   pg_promote(): t
#   right after that:    timeline of the log: 2  of pg_control_checkpoint(): 1  pg_rewind: no rewind required
#   after a CHECKPOINT:  timeline of the log: 2  of pg_control_checkpoint(): 2  pg_rewind: servers diverged
# Hurt:     failover scripts that rewind the old primary at once: exit 0, nothing done, and what both wrote stays apart; and
#           watchers that tell servers apart by pg_control_checkpoint().timeline_id.
# Instead:  CHECKPOINT on the promoted server before pg_rewind; ask the timeline of pg_walfile_name(pg_current_wal_lsn()) or
#           IDENTIFY_SYSTEM.
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
bin=/usr/lib/postgresql/15/bin
[ -x $bin/postgres ] || debian postgresql-15
chmod 755 "$work" && install -d -o postgres "$work/server"
as() { cd / && exec setpriv --reuid postgres --regid postgres --init-groups "$@"; } # In a process of its own.
start() { # FOLDER PORT
    as $bin/postgres -D "$work/server/$1" -p "$2" -k "$work/server" -c listen_addresses= -c fsync=off -c wal_keep_size=512MB \
        2>"$work/$1.log" & pids+=($!)
    until $bin/pg_isready -qh "$work/server" -p "$2"; do sleep 0.2; done
}
ask() { $bin/psql -X -h "$work/server" -U postgres -d postgres -p "$1" -Atqc "$2"; }
rewind() { # Only looks, for --dry-run.
    (as $bin/pg_rewind --dry-run -D "$work/server/old" --source-server="host=$work/server port=2 user=postgres dbname=postgres") \
        >"$work/rewind" 2>&1 || cat "$work/rewind" >&2
    grep -oE 'no rewind required|servers diverged' "$work/rewind"
}

(as $bin/initdb -D "$work/server/old" -A trust --no-sync --data-checksums >/dev/null)
start old 1
(as $bin/pg_basebackup -h "$work/server" -p 1 -D "$work/server/new" -R -c fast --no-sync)
start new 2
ask 1 "CREATE TABLE messages AS SELECT n, repeat('x', 500) FROM generate_series(1, 60000) n"
end=$(ask 1 'SELECT pg_current_wal_lsn()')
until [ "$(ask 2 "SELECT pg_last_wal_replay_lsn() >= '$end'")" = t ]; do sleep 0.2; done

promoted=$(ask 2 'SELECT pg_promote()')
ask 2 "INSERT INTO messages VALUES (0, 'only here')"
ask 1 "INSERT INTO messages VALUES (0, 'only there')"
kill -INT "${pids[0]}" && wait "${pids[0]}" || true
look() {
    log=$(ask 2 'SELECT left(pg_walfile_name(pg_current_wal_lsn()), 8)::int')
    control=$(ask 2 'SELECT timeline_id FROM pg_control_checkpoint()')
    said=$(rewind)
    printf '%-20s timeline of the log: %s  of pg_control_checkpoint(): %s  pg_rewind: %s\n' "$1" "$log" "$control" "$said"
    result+="$log $control $said|"
}
result=''
echo "pg_promote(): $promoted"
look 'right after that:'
ask 2 CHECKPOINT
look 'after a CHECKPOINT:'
[ "$promoted" = t ] && [ "$result" = '2 1 no rewind required|2 2 servers diverged|' ]
