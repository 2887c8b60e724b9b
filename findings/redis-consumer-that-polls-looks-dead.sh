#!/usr/bin/env bash
# Redis 7.0: a consumer that asks with XREADGROUP and gets nothing does not exist, or grows idle, however often it asks.
#
# Versions: Redis 7.0.15 (Debian 12).
# Guess:    XREADGROUP makes the consumer, and "idle" of XINFO CONSUMERS is the time since it last asked (so the documentation:
#           "since the consumer's last attempted interaction").
# Seen:     a consumer appears with its first entry, not with its first question; and "idle" is the time since it last *got*
#           something: one that asks all the time in a quiet stream looks as dead as one that was killed.
# Output:
#   asked 5 times, got nothing:         consumers: 0
#   asked once more, got one entry:     consumers: 1
#   asked 15 times more, got nothing:   idle: 3 s or more, as long as it got nothing
# Hurt:     who watches workers by their idle time, or deletes consumers that are idle for long: XGROUP DELCONSUMER on a live one
#           throws away what it has pending, just because the night was quiet. A newcomer cannot be seen at all.
# Instead:  let each worker write a sign of life of its own (SET worker:NAME EX 30), and call XGROUP CREATECONSUMER at its start.
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
command -v redis-server >/dev/null || debian redis-server
redis-server --port 0 --unixsocket "$work/redis" --dir "$work" --save '' >/dev/null & pids+=($!)
until [ -S "$work/redis" ]; do sleep 0.1; done
redis() { redis-cli -s "$work/redis" "$@"; }
ask() { redis xreadgroup group g worker block 200 streams jobs '>' >/dev/null; }
consumers() { redis xinfo consumers jobs g | sed -n '/^name$/{n;p}' | wc -l; }
idle() { redis xinfo consumers jobs g | sed -n '/^idle$/{n;p}'; }

redis xgroup create jobs g '$' mkstream >/dev/null
for _ in 1 2 3 4 5; do ask; done
before=$(consumers)
echo "asked 5 times, got nothing:         consumers: $before"
redis xadd jobs '*' n 1 >/dev/null
ask
after=$(consumers)
echo "asked once more, got one entry:     consumers: $after"
redis xack jobs g "$(redis xinfo stream jobs | sed -n '/^last-generated-id$/{n;p}')" >/dev/null
for _ in $(seq 15); do ask; done
late=$(idle)
if [ "$late" -ge 3000 ]; then
    echo "asked 15 times more, got nothing:   idle: 3 s or more, as long as it got nothing"
else
    echo "asked 15 times more, got nothing:   idle: $late ms"
fi
[ "$before" = 0 ] && [ "$after" = 1 ] && [ "$late" -ge 3000 ]
