#!/usr/bin/env bash
# Chromium: while one WebSocket handshake to an address is unanswered, the pages of that site cannot open another to it, by
# whatever name.
#
# Versions: Chromium 156 (Debian 12), headless.
# Guess:    each `new WebSocket()` makes its own connection; one that hangs harms nobody else, as with fetch().
# Seen:     with one handshake that the server does not answer, the site's other WebSockets to the same address and port stay in
#           CONNECTING without even a TCP connection: from another page, and under another host name of the address. fetch() to it,
#           a WebSocket to another address, and a frame of another site are not held up. All go through in the moment in which the
#           first is given up. (RFC 6455, 4.1 asks for one connection in CONNECTING at a time for each host and port.)
# Output:
#   in the 15 s of the slow handshake:
#     a frame of another site
#     another address
#     fetch()
#     slow handshake begins
#   after it was given up:
#     another name of it
#     another page of the site
#     the same address
# Hurt:     servers that hold a handshake while they ask an auth service, proxies that queue it: one slow login blocks every other
#           socket of the site in that browser, the reconnects too.
# Instead:  answer the handshake at once and let the client authenticate in a message; give the handshake a short limit on the
#           server, and in the page a timer that calls close().
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT
export TMPDIR=$work

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
command -v python3 >/dev/null || debian python3
command -v chromium >/dev/null || debian chromium
python3 - "$work" <<'PY'
import base64, hashlib, queue, re, socket, subprocess, sys, threading, time

PAGE = """<script>
const tell = (what) => fetch("/told?" + encodeURIComponent(what));
const open = (what, url) => { const socket = new WebSocket(url); socket.onopen = () => tell(what); return socket; };
const port = location.port;
const frame = (url) => document.body.append(Object.assign(document.createElement("iframe"), { src: url }));
if (location.pathname === "/page") {
  const slow = open("slow", `ws://127.0.0.1:${port}/slow`);
  frame("/other");
  frame(`http://other.localhost:${port}/foreign`);
  open("the same address", `ws://127.0.0.1:${port}/quick`);
  open("another name of it", `ws://localhost:${port}/quick`);
  open("another address", `ws://127.0.0.2:${port}/quick`);
  setTimeout(() => tell("fetch()"), 2000);
  setTimeout(() => { tell("gave the slow one up"); slow.close(); }, 15000);
} else {
  open(location.pathname === "/other" ? "another page of the site" : "a frame of another site", `ws://127.0.0.1:${port}/quick`);
}
</script>"""
told = queue.Queue()


def answer(connection):
    request = b""
    while not request.endswith(b"\r\n\r\n"):
        if not (part := connection.recv(4096)):
            return
        request += part
    path, key = request.split()[1].decode(), re.search(rb"Sec-WebSocket-Key: (.*)\r", request)
    if path == "/slow":
        told.put("slow handshake begins")
        while connection.recv(4096):
            pass
    elif key:
        proof = base64.b64encode(hashlib.sha1(key[1] + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
        connection.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                           b"Sec-WebSocket-Accept: " + proof + b"\r\n\r\n")
        connection.recv(4096)
    else:
        if path.startswith("/told?"):
            told.put(path[6:].replace("%20", " "))
        body = b"<body>" + PAGE.encode() if path in ("/page", "/other", "/foreign") else b""
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nConnection: close\r\n"
                           b"Content-Length: %d\r\n\r\n" % len(body) + body)
        connection.close()


def serve(listener):
    while True:
        threading.Thread(target=answer, args=(listener.accept()[0],), daemon=True).start()


def two_addresses():
    while True:
        one = socket.create_server(("127.0.0.1", 0))
        port = one.getsockname()[1]
        try:
            return port, (one, socket.create_server(("127.0.0.2", port)))
        except OSError:  # The port is taken at the other address.
            one.close()


port, listeners = two_addresses()
for listener in listeners:
    threading.Thread(target=serve, args=(listener,), daemon=True).start()
browser = subprocess.Popen(["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
                            "--disable-background-networking", "--disable-component-update",
                            f"--user-data-dir={sys.argv[1]}/profile", f"http://127.0.0.1:{port}/page"], stderr=subprocess.DEVNULL)
seen, end = [], time.monotonic() + 180
try:
    while len(seen) < 8 and time.monotonic() < end:
        try:
            seen.append(told.get(timeout=1))
        except queue.Empty:
            pass
finally:
    browser.terminate()
    browser.wait()
given_up = "gave the slow one up"
before = sorted(seen[: seen.index(given_up)]) if given_up in seen else sorted(seen)
after = sorted(seen[len(before) + 1 :])
print("in the 15 s of the slow handshake:", *before, sep="\n  ")
print("after it was given up:", *after, sep="\n  ")
sys.exit(before != ["a frame of another site", "another address", "fetch()", "slow handshake begins"]
         or after != ["another name of it", "another page of the site", "the same address"])
PY
