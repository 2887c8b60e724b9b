#!/usr/bin/env bash
# Hypercorn's websocket_ping_interval sends pings and never looks whether a pong comes: dead clients stay.
#
# Versions: Hypercorn 0.18.0 (asyncio and Trio workers), uvicorn 0.54.0, Python 3.11.
# Guess:    as in uvicorn, a client that answers no ping is closed after a while; that is what the interval is for.
# Seen:     with an interval of 1 s Hypercorn has sent ten pings in 10 s, got no answer, and keeps the connection; there is no
#           option for a time limit. uvicorn with --ws-ping-interval 1 --ws-ping-timeout 1 closes with 1011 after 2 s.
# Output:
#   Hypercorn, asyncio   pings each second; still open after 10 s, no pong was sent
#   Hypercorn, trio      pings each second; still open after 10 s, no pong was sent
#   uvicorn              a ping; closed with 1011 after 2 s
# Hurt:     who moves from uvicorn, or counts who is online by open connections: phones that lost their network stay "online", with
#           their buffers, for as long as TCP keeps trying.
# Instead:  a ping of the application's own protocol with a time limit, or TCP_USER_TIMEOUT on the listening socket.
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
pypi hypercorn==0.18.0 trio==0.35.0 uvicorn==0.54.0 websockets==17.4
cat >"$work/app.py" <<'PY'
async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (event := await receive())["type"] != "lifespan.shutdown":
            await send({"type": event["type"] + ".complete"})
        return await send({"type": "lifespan.shutdown.complete"})
    await receive()
    await send({"type": "websocket.accept"})
    while (await receive())["type"] != "websocket.disconnect":
        pass
PY
echo 'websocket_ping_interval = 1' >"$work/hypercorn.toml"
cd "$work"
export PYTHONPATH=$work/lib:$work
python3 - <<'PY'
import socket, subprocess, sys, time

seen = []


def run(what, *command):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", *(part.format(port=port) for part in command)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        look(what, connect(port))
    finally:
        process.terminate()
        process.wait()


def connect(port):
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.1)


def look(what, client):
    client.sendall(b"GET / HTTP/1.1\r\nHost: chat\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                   b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
    client.settimeout(0.2)
    received, began, over = b"", time.monotonic(), False
    while not over and time.monotonic() - began < 10.5:
        try:
            part = client.recv(4096)
            received += part
            over = not part
        except TimeoutError:
            pass
    frames, pings, code = received.partition(b"\r\n\r\n")[2], 0, None
    while frames:
        if frames[0] == 0x89:
            pings += 1
        elif frames[0] == 0x88:
            code = int.from_bytes(frames[2:4], "big")
        frames = frames[2 + frames[1] :]
    seen.append((pings >= 8, code))
    print(f"{what:20} {'pings each second' if pings >= 8 else 'a ping'}; "
          + (f"closed with {code} after {time.monotonic() - began:.0f} s" if over else "still open after 10 s, no pong was sent"))


for worker in ("asyncio", "trio"):
    run(f"Hypercorn, {worker}", "hypercorn", "-k", worker, "-c", "hypercorn.toml", "-b", "127.0.0.1:{port}", "app:app")
run("uvicorn", "uvicorn", "app:app", "--port", "{port}", "--ws-ping-interval", "1", "--ws-ping-timeout", "1")
sys.exit(seen != [(True, None), (True, None), (False, 1011)])
PY
