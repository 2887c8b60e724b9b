#!/usr/bin/env bash
# A pool event that refuses fresh connections with DisconnectionError ends as InvalidRequestError, and one's own reason is lost.
#
# Versions: SQLAlchemy 2.1.9.
# Guess:    raising DisconnectionError in "checkout" (the documented way to say "this connection is no good, take another") is
#           tried again a few times, and then that error, or an OperationalError, reaches the caller.
# Seen:     it is tried twice, without a pause, and then the caller gets InvalidRequestError("This connection is closed"), which
#           is no DBAPIError, with neither __cause__ nor __context__: the message one raised is only in the pool's log.
# Output:
#   DisconnectionError('this server is a standby')  tries: 2  the caller gets InvalidRequestError('This connection is closed')
#   NotPrimary('this server is a standby')          tries: 1  the caller gets NotPrimary('this server is a standby')
# Hurt:     who checks in "checkout" that the server is the primary: during a failover, when all connections are refused, code that
#           retries on OperationalError or DisconnectionError does not, and the log blames a programming error.
# Instead:  raise an exception of one's own there (any other passes unchanged), or catch InvalidRequestError around connect().
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
pypi sqlalchemy==2.1.9
PYTHONPATH=$work/lib python3 - <<'PY'
import sys
from sqlalchemy import create_engine, event, exc, pool

seen = []


class NotPrimary(Exception):
    pass


def show(refusal):
    engine = create_engine("sqlite://", poolclass=pool.QueuePool)
    tries = []

    @event.listens_for(engine, "checkout")
    def refuse(*_):
        tries.append(1)
        raise refusal

    try:
        engine.connect()
    except Exception as error:
        told = str(refusal) in f"{error} {error.__cause__} {error.__context__}"
        seen.append((type(error).__name__, isinstance(error, exc.DBAPIError), len(tries), told))
        print(f"{refusal!r:47} tries: {len(tries)}  the caller gets {error!r}")


show(exc.DisconnectionError("this server is a standby"))
show(NotPrimary("this server is a standby"))
sys.exit(seen != [("InvalidRequestError", False, 2, False), ("NotPrimary", False, 1, True)])
PY
