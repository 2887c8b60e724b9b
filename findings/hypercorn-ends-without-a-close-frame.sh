#!/usr/bin/env bash
# Hypercorn at SIGTERM: with the Trio worker WebSockets end without a Close, with asyncio by 1011; and the application is not told.
#
# Versions: Hypercorn 0.18.0, uvicorn 0.54.0, trio 0.35.0, Python 3.11.
# Guess:    an orderly stop sends 1001 or 1012 and gives the application websocket.disconnect, as uvicorn does (1012).
# Seen:     Hypercorn waits for its graceful_timeout (3 s) without saying anything to anybody, then cancels the application. Clients
#           of the Trio worker see the connection break (1006), those of the asyncio worker 1011, "internal error".
# Output:
#   Hypercorn, trio      client: no Close, end of file  after 3 s   application: cancelled
#   Hypercorn, asyncio   client: Close 1011             after 3 s   application: cancelled
#   uvicorn              client: Close 1012             after 0 s   application: websocket.disconnect
# Hurt:     clients that hold back longer after 1011 or alarm at it, dashboards that count 1006 as network trouble: each deployment
#           looks like a crash. Clean-up after websocket.disconnect does not run; only `finally` does.
# Instead:  on lifespan or a signal of one's own send websocket.close with 1012 to each connection before the server is stopped.
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
import os


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while (event := await receive())["type"] != "lifespan.shutdown":
            await send({"type": event["type"] + ".complete"})
        return await send({"type": "lifespan.shutdown.complete"})
    await receive()
    await send({"type": "websocket.accept"})
    told = "cancelled"
    try:
        while (await receive())["type"] != "websocket.disconnect":
            pass
        told = "websocket.disconnect"
    finally:
        with open(os.environ["TOLD"], "w") as file:
            file.write(told)
PY
cd "$work"
export PYTHONPATH=$work/lib:$work TOLD=$work/told
python3 - <<'PY'
import os, socket, subprocess, sys, time

seen = []


def run(what, *command):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-m", *(part.format(port=port) for part in command)],
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = connect(port)
        client.sendall(b"GET / HTTP/1.1\r\nHost: chat\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                       b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n\r\n")
        client.settimeout(20)
        assert b"101" in client.recv(4096)
        began = time.monotonic()
        process.terminate()
        frame = b""
        while part := client.recv(4096):
            frame += part
        seconds = round(time.monotonic() - began)
    finally:
        process.terminate()
        process.wait()
    code = int.from_bytes(frame[2:4], "big") if frame else None
    with open(os.environ["TOLD"]) as file:
        told = file.read()
    seen.append((code, told))
    print(f"{what:20} client: {f'Close {code}' if code else 'no Close, end of file':22} after {seconds} s   application: {told}")


def connect(port):
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port))
        except ConnectionRefusedError:
            time.sleep(0.1)


for worker in ("trio", "asyncio"):
    run(f"Hypercorn, {worker}", "hypercorn", "-k", worker, "-b", "127.0.0.1:{port}", "app:app")
run("uvicorn", "uvicorn", "app:app", "--port", "{port}")
sys.exit(seen != [(None, "cancelled"), (1011, "cancelled"), (1012, "websocket.disconnect")])
PY
