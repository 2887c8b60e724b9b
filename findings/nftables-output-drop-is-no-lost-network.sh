#!/usr/bin/env bash
# A firewall rule that drops in the output hook is no cut cable: TCP_INFO shows nothing unacknowledged and nothing sent again.
#
# Versions: nftables 1.0.6 (Debian 12), Linux; seen on Linux 6.18.
# Guess:    packets dropped on the way out are lost like those dropped on the way in: the kernel sends again, tcpi_unacked,
#           tcpi_retransmits and tcpi_total_retrans grow.
# Seen:     the sender is told of the drop inside the kernel and counts the data as not sent yet: unacked 0, retransmissions 0,
#           everything in notsent, as with a reader whose window is closed. With the rule in the input hook the counters grow. send()
#           succeeds in both.
# Output:
#   dropped in output  send() took 1000 bytes; after 5 s  unacked: 0  retransmits: 0  total_retrans: 0  notsent: 1000
#   dropped in input   send() took 1000 bytes; after 5 s  unacked: > 0  retransmits: > 0  total_retrans: > 0  notsent: 0
# Hurt:     fault tests that cut with an OUTPUT rule: code that finds dead peers by tcpi_unacked or tcpi_retransmits passes in a real
#           outage and fails in the test, and code that reads notsent as "slow reader" the other way round.
# Instead:  drop in the input hook of the other side (or in forward, between namespaces), where the packet has been sent.
set -euo pipefail
work=$(mktemp -d) made='' pids=()
finish() { kill "${pids[@]}"; wait; rm -rf "$work" $made; }
trap 'set +e; finish 2>/dev/null' EXIT

debian() { # Installs packages; policy-rc.d keeps their services from starting.
    [ -e /usr/sbin/policy-rc.d ] || { made=/usr/sbin/policy-rc.d; printf '#!/bin/sh\nexit 101\n' >$made; chmod +x $made; }
    apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -qqy install --no-install-recommends "$@" >"$work/apt" || exit 2
}
command -v python3 >/dev/null || debian python3
[ -x /usr/sbin/nft ] || debian nftables
[ -x /usr/sbin/ip ] || [ -x /sbin/ip ] || debian iproute2
export PATH=$PATH:/usr/sbin:/sbin
# A network of its own: no rule touches this machine's.
unshare --net python3 - <<'PY'
import socket, struct, subprocess, sys, time

subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
seen = []


def counters(connection):
    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    unacked, = struct.unpack_from("I", info, 24)
    total, = struct.unpack_from("I", info, 100)
    notsent, = struct.unpack_from("I", info, 144)
    return {"unacked": unacked > 0, "retransmits": info[2] > 0, "total_retrans": total > 0, "notsent": notsent}


for hook in ("output", "input"):
    listener = socket.create_server(("127.0.0.1", 0))
    reader = socket.create_connection(listener.getsockname())
    sender = listener.accept()[0]
    ours, theirs = sender.getsockname()[1], reader.getsockname()[1]
    rules = (f"add table cut; add chain cut drops {{ type filter hook {hook} priority 0; }};"
             f"add rule cut drops tcp sport {ours} tcp dport {theirs} drop")
    subprocess.run(["nft", rules], check=True)
    sent = sender.send(bytes(1000))
    time.sleep(5)
    seen.append(counters(sender))
    subprocess.run(["nft", "delete table cut"], check=True)
    said = "  ".join(f"{name}: {value if name == 'notsent' else '> 0' if value else '0'}" for name, value in seen[-1].items())
    print(f"dropped in {hook:7} send() took {sent} bytes; after 5 s  {said}")
sys.exit(seen != [{"unacked": False, "retransmits": False, "total_retrans": False, "notsent": 1000},
                  {"unacked": True, "retransmits": True, "total_retrans": True, "notsent": 0}])
PY
