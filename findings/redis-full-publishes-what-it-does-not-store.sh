#!/usr/bin/env bash
# At maxmemory Redis refuses the XADD of a pipeline and executes its PUBLISH: subscribers hear of what is stored nowhere.
#
# Versions: Redis 7.0.15 (Debian 12), redis-py 8.1.0.
# Guess:    a full Redis (noeviction) refuses all that needs memory, so a pipeline of XADD and PUBLISH fails as one.
# Seen:     PUBLISH is never refused. In a plain pipeline, and in a Lua script that publishes first, the message goes out and the
#           entry is refused; only in MULTI is nothing done at all, though XADD alone is refused there.
# Output:
#   pipeline                   answer: OutOfMemoryError, 1      heard: yes  entries: 0
#   MULTI                      answer: OutOfMemoryError         heard: no   entries: 0
#   Lua, PUBLISH before XADD   answer: OutOfMemoryError         heard: yes  entries: 0
#   Lua, XADD before PUBLISH   answer: OutOfMemoryError         heard: no   entries: 0
# Hurt:     who stores in a stream and wakes readers by pub/sub in one pipeline: live clients show a message that no history has,
#           and the caller, who got an error, sends it again.
# Instead:  MULTI/EXEC around the two, or a script whose XADD comes before its PUBLISH.
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
redis-server --port 0 --unixsocket "$work/redis" --dir "$work" --save '' --maxmemory 100kb >/dev/null & pids+=($!)
until [ -S "$work/redis" ]; do sleep 0.1; done

PYTHONPATH=$work/lib python3 - "$work/redis" <<'PY'
import sys, redis

client = redis.Redis(unix_socket_path=sys.argv[1], decode_responses=True)
listener = client.pubsub(ignore_subscribe_messages=True)
listener.subscribe("room")
listener.get_message(timeout=1)
seen = []


def show(how, call):
    try:
        answers = call()
        said = ", ".join(type(a).__name__ if isinstance(a, Exception) else repr(a) for a in answers)
    except redis.RedisError as error:
        said = type(error).__name__
    heard = listener.get_message(timeout=0.5)
    seen.append((bool(heard), client.xlen("messages")))
    print(f"{how:26} answer: {said:24} heard: {'yes' if heard else 'no':4} entries: {seen[-1][1]}")


def together(transaction):
    pipe = client.pipeline(transaction=transaction)
    pipe.xadd("messages", {"text": how}).publish("room", how)
    return pipe.execute(raise_on_error=False)


for how, transaction in (("pipeline", False), ("MULTI", True)):
    show(how, lambda: together(transaction))
publish, store = "redis.call('PUBLISH', 'room', 'm')", "redis.call('XADD', 'messages', '*', 'text', 'm')"
show("Lua, PUBLISH before XADD", lambda: [client.eval(f"{publish} return {store}", 0)])
show("Lua, XADD before PUBLISH", lambda: [client.eval(f"{store} return {publish}", 0)])
sys.exit(seen != [(True, 0), (False, 0), (True, 0), (False, 0)])
PY
