#!/usr/bin/env bash
# A WebSocket handler that only sends stops answering pings and Closes after a few messages from its client: after two with
# trio-websocket, after some with websockets, always with aiohttp.
#
# Versions: trio-websocket 0.12.2, websockets 17.4 (asyncio), aiohttp 3.14.5, trio 0.35.0, Python 3.11.
# Guess:    the library answers pings and closes by itself in the background, also when the handler never receives.
# Seen:     it does so only while there is room for the messages that nobody takes: the reader stops at the first message that does
#           not fit, and with it the pings and Closes behind. aiohttp looks at them in receive() alone. The same reader takes the
#           pongs: the server's own ping to such a client gets no answer either, and it takes a client that is well for dead.
# Output:
#   trio-websocket     1 messages not received:   the client's ping: pong      the server's ping: pong
#   trio-websocket     2 messages not received:   the client's ping: no pong   the server's ping: no pong
#   websockets        15 messages not received:   the client's ping: pong      the server's ping: pong
#   websockets        40 messages not received:   the client's ping: no pong   the server's ping: no pong
#   aiohttp            0 messages not received:   the client's ping: no pong
# Hurt:     who serves a feed (`while True: await socket.send(next)`): all is well until a client sends something, "is typing" or a
#           heartbeat of its library; then it is cut after its ping's time limit, and comes back, and is cut again.
# Instead:  always have a task that receives, and throws away what nobody wants.
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
pypi trio-websocket==0.12.2 trio==0.35.0 websockets==17.4 aiohttp==3.14.5 websocket-client==1.9.2
cat >"$work/feeds.py" <<'PY'
"""Serves a feed with the library named, prints its port, and says how its own ping after 2 s went."""
import asyncio, sys, aiohttp.web, trio, trio_websocket, websockets.asyncio.server


async def with_trio(request):
    socket = await request.accept()
    await socket.send_message("feed")
    await trio.sleep(2)
    with trio.move_on_after(3) as limit:
        await socket.ping()
    print("no pong" if limit.cancelled_caught else "pong", flush=True)
    await trio.sleep(5)


async def serve_trio():
    async with trio.open_nursery() as nursery:
        server = await nursery.start(trio_websocket.serve_websocket, with_trio, "127.0.0.1", 0, None)
        print(server.port, flush=True)


async def with_websockets(socket):
    await socket.send("feed")
    await asyncio.sleep(2)
    pong = await socket.ping()
    try:
        await asyncio.wait_for(pong, 3)
        print("pong", flush=True)
    except TimeoutError:
        print("no pong", flush=True)
    await asyncio.sleep(5)


async def serve_websockets():
    async with websockets.asyncio.server.serve(with_websockets, "127.0.0.1", 0, ping_interval=None) as server:
        print(server.sockets[0].getsockname()[1], flush=True)
        await asyncio.Future()


async def with_aiohttp(request):
    socket = aiohttp.web.WebSocketResponse()
    await socket.prepare(request)
    await socket.send_str("feed")
    print("-", flush=True)
    await asyncio.sleep(10)
    return socket


async def serve_aiohttp():
    app = aiohttp.web.Application()
    app.router.add_get("/", with_aiohttp)
    runner = aiohttp.web.AppRunner(app)
    await runner.setup()
    await aiohttp.web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.Future()


if sys.argv[1] == "trio-websocket":
    trio.run(serve_trio)
else:
    asyncio.run(serve_websockets() if sys.argv[1] == "websockets" else serve_aiohttp())
PY
PYTHONPATH=$work/lib python3 - "$work/feeds.py" <<'PY'
import subprocess, sys, threading, time, websocket

seen = {}


def pong_comes(client, seconds):
    client.ping()
    client.settimeout(seconds)
    try:
        while client.recv_data_frame(True)[0] != websocket.ABNF.OPCODE_PONG:
            pass
    except websocket.WebSocketTimeoutException:
        return False
    return True


def answered(library, messages):
    server = subprocess.Popen([sys.executable, sys.argv[1], library], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        client = websocket.create_connection(f"ws://127.0.0.1:{server.stdout.readline().strip()}/", timeout=10)
        client.recv()
        for _ in range(messages):
            client.send("typing")
        time.sleep(0.5)
        client_ping = pong_comes(client, 1.5)
        # And now answer the server's ping, as any client does.
        client.settimeout(6)
        reading = threading.Thread(target=read, args=(client,), daemon=True)
        reading.start()
        return client_ping, server.stdout.readline().strip()
    finally:
        server.terminate()
        server.wait()


def read(client):
    try:
        while True:
            client.recv_data_frame(True)
    except (websocket.WebSocketException, OSError):
        pass


def show(library, messages):
    client_ping, server_ping = seen[library, messages]
    print(f"{library:16} {messages:3} messages not received:   the client's ping: {'pong' if client_ping else 'no pong':9}"
          + (f" the server's ping: {server_ping}" if server_ping != "-" else ""))


CASES = [("trio-websocket", 1), ("trio-websocket", 2), ("websockets", 15), ("websockets", 40), ("aiohttp", 0)]
for case in CASES:
    seen[case] = answered(*case)
    show(*case)
sys.exit([seen[case] for case in CASES] != [(True, "pong"), (False, "no pong"), (True, "pong"), (False, "no pong"), (False, "-")])
PY
