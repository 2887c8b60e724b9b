#!/bin/sh
# What systemd says of the units: `verify` has nothing to say, and the service is no more exposed than 1.0 of 10.
set -eu
cd "$(dirname "$0")/../systemd"

if ! command -v systemd-analyze >/dev/null; then
    echo "The units were not looked at: systemd-analyze is not installed."
    exit 0
fi
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT

# look_at THRESHOLD [DROP-IN]: the threshold in tenths.
look_at() {
    rm -rf "$copy"/*
    units=$(echo *.service *.socket *.target)
    for unit in $units; do
        # A checkout is not installed, and `verify` wants the program to be there.
        sed 's|/opt/chatd/bin/chatd|/bin/true|' "$unit" >"$copy/$unit"
    done
    if [ $# -gt 1 ]; then
        mkdir "$copy/chatd.service.d"
        cp "drop-ins/$2" "$copy/chatd.service.d"
    fi
    said=$(cd "$copy" && systemd-analyze verify --man=no $units 2>&1) || said=${said:-verify failed}
    if [ -n "$said" ]; then
        echo "$said" >&2
        exit 1
    fi
    # The table is for who wants to know more: not in a pipe, which would hide that it is above the threshold.
    if systemd-analyze security --offline=true --threshold="$1" --no-pager "$copy/chatd.service" >"$copy/security"; then
        echo "${2:-as shipped}: $(tail -1 "$copy/security")"
    else
        cat "$copy/security" >&2
        exit 1
    fi
}

# 60-systemd-254.conf is for a newer systemd than some of those that run this.
look_at 10
look_at 10 50-local-only.conf
# Without the fence around outgoing connections, which would hold for the ports, too.
look_at 12 40-own-ports.conf
