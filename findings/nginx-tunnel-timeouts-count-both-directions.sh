#!/usr/bin/env bash
# nginx: on a WebSocket, proxy_read_timeout and send_timeout are begun anew by traffic in the *other* direction.
#
# Versions: nginx 1.22.1 (Debian 12).
# Guess:    proxy_read_timeout ends the connection "if the proxied server does not transmit anything within this time", and
#           send_timeout one whose client takes nothing; each looks at its own direction.
# Seen:     with all of them at 2 s: a silent connection ends after 2 s. But a client that sends something each 0.5 s keeps the
#           connection to a server that neither answers nor reads any more; and a client that reads nothing, which alone is dropped
#           after 2 s, is kept as long as it sends.
# Output:
#   silent on both sides                                             ended by nginx
#   client sends, server hangs (reads and sends nothing)             kept for 10 s
#   server sends, client reads nothing                               ended by nginx
#   server sends, client reads nothing and sends                     kept for 10 s
# Hurt:     who leaves the finding of hung servers and stuck readers to nginx: a browser whose page is stuck, or a client library
#           with its own heartbeat, holds its connection, its buffers and (for a hung server) its user's silence for ever.
# Instead:  ping from the server and count the pongs there, limit the queue of each connection there, and let the client reconnect
#           when its own heartbeat is not answered.
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
command -v python3 >/dev/null || debian python3
[ -x /usr/sbin/nginx ] || debian nginx-light
python3 - "$work" <<'PY'
import os, socket, subprocess, sys, time

work = sys.argv[1]
upstream = socket.create_server(("127.0.0.1", 0))
with socket.create_server(("127.0.0.1", 0)) as free:
    port = free.getsockname()[1]
with open(f"{work}/nginx.conf", "w") as file:
    file.write(f"""
daemon off; pid {work}/pid; error_log {work}/error.log;
events {{ }}
http {{
    access_log off; client_body_temp_path {work}/1; proxy_temp_path {work}/2;
    fastcgi_temp_path {work}/3; uwsgi_temp_path {work}/4; scgi_temp_path {work}/5;
    server {{
        listen 127.0.0.1:{port}; send_timeout 2s;
        location / {{
            proxy_pass http://127.0.0.1:{upstream.getsockname()[1]}; proxy_http_version 1.1;
            proxy_set_header Upgrade $http_upgrade; proxy_set_header Connection upgrade;
            proxy_read_timeout 2s; proxy_send_timeout 2s;
        }}
    }}
}}""")
nginx = subprocess.Popen(["/usr/sbin/nginx", "-c", f"{work}/nginx.conf", "-e", f"{work}/error.log"])
seen = []


def connect():
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", port))
    client.sendall(b"GET / HTTP/1.1\r\nHost: chat\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
    server = upstream.accept()[0]
    server.recv(4096)
    server.sendall(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: upgrade\r\n\r\n")
    assert b"101" in client.recv(4096)
    return client, server


def send(peer, data):
    """Says whether nginx still has the connection."""
    peer.setblocking(False)
    try:
        while peer.send(data) and len(data) > 10:
            pass
    except BlockingIOError:
        pass
    except OSError:
        return False
    return True


def ended(peer):
    peer.setblocking(False)
    try:
        return peer.recv(4096) == b""
    except BlockingIOError:
        return False
    except OSError:
        return True


def show(what, client_sends, server_floods):
    client, server = connect()
    began = time.monotonic()
    over = False
    while not over and time.monotonic() - began < 10:
        if client_sends:
            send(client, b"ping")
        if server_floods:
            over = not send(server, bytes(65536))
        else:
            over = ended(client)
        time.sleep(0.5)
    client.close(), server.close()
    seen.append(over)
    print(f"{what:64} {'ended by nginx' if over else 'kept for 10 s'}")


try:
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            break
        except ConnectionRefusedError:
            time.sleep(0.1)
    show("silent on both sides", False, False)
    show("client sends, server hangs (reads and sends nothing)", True, False)
    show("server sends, client reads nothing", False, True)
    show("server sends, client reads nothing and sends", True, True)
finally:
    nginx.terminate()
    nginx.wait()
sys.exit(seen != [True, False, True, False])
PY
