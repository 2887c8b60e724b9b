#!/usr/bin/env bash
# When Redis cannot write its snapshot it refuses PING, and a client with a health check can then not even GET or PUBLISH.
#
# Versions: Redis 7.0.15 (Debian 12), redis-py 8.1.0.
# Guess:    after a failed BGSAVE (stop-writes-on-bgsave-error, on by default) writes are refused with MISCONF; reads, PUBLISH
#           and PING go on, since they change nothing.
# Seen:     GET and PUBLISH go on, but PING is refused with MISCONF as if it were a write. redis-py with health_check_interval
#           sends a PING when it connects and then each interval, so there GET and PUBLISH raise ResponseError too, and not a
#           ConnectionError.
# Output:
#   SET                                        ResponseError: MISCONF …
#   GET                                        b'value'
#   PUBLISH                                    0
#   ECHO                                       b'alive'
#   PING                                       ResponseError: MISCONF …
#   GET, health_check_interval=30              ResponseError: MISCONF …
#   PUBLISH, health_check_interval=30          ResponseError: MISCONF …
# Hurt:     who sets health_check_interval, or asks readiness with PING: a full disk takes down the reads and the fan-out too,
#           which Redis itself would still serve, and code that retries on ConnectionError alone does not catch it.
# Instead:  look whether Redis is alive with a command that is no PING (ECHO), look for rdb_last_bgsave_status:err, and where
#           nothing in Redis must outlive it, set `save ""` or stop-writes-on-bgsave-error no.
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
command -v redis-server >/dev/null || debian redis-server
pypi redis==8.1.0

finish() { kill -KILL "${pids[@]}"; wait; rm -rf "$work" $made; } # SIGTERM would wait for a snapshot.
# Its directory is gone after the start: so no snapshot can be written.
mkdir "$work/data"
redis-server --port 0 --unixsocket "$work/redis" --dir "$work/data" --save '3600 1' >/dev/null & pids+=($!)
until [ -S "$work/redis" ]; do sleep 0.1; done
redis() { redis-cli -s "$work/redis" "$@"; }
redis set key value >/dev/null
rmdir "$work/data"
redis bgsave >/dev/null
until redis info persistence | grep -q last_bgsave_status:err; do sleep 0.1; done

PYTHONPATH=$work/lib python3 - "$work/redis" <<'PY'
import sys, redis

seen = []


def show(what, call):
    try:
        answer = repr(call())
    except redis.RedisError as error:
        answer = f"{type(error).__name__}: {str(error)[:7]} …"
    seen.append(answer)
    print(f"{what:42} {answer}")


def checked():
    return redis.Redis(unix_socket_path=sys.argv[1], health_check_interval=30)


plain = redis.Redis(unix_socket_path=sys.argv[1])
show("SET", lambda: plain.set("key", "other"))
show("GET", lambda: plain.get("key"))
show("PUBLISH", lambda: plain.publish("room", "Hello"))
show("ECHO", lambda: plain.echo("alive"))
show("PING", plain.ping)
show("GET, health_check_interval=30", lambda: checked().get("key"))
show("PUBLISH, health_check_interval=30", lambda: checked().publish("room", "Hello"))
refused = "ResponseError: MISCONF …"
sys.exit(seen != [refused, "b'value'", "0", "b'alive'", refused, refused, refused])
PY
