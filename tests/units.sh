#!/bin/sh
# What systemd says of the units: `verify` has nothing to say, and no service is more exposed than 1.0 of 10.
set -eu
cd "$(dirname "$0")/../systemd"

if ! command -v systemd-analyze >/dev/null; then
    echo "The units were not looked at: systemd-analyze is not installed."
    exit 0
fi
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
for unit in *.service *.socket; do
    # A checkout is not installed, and `verify` wants the program to be there.
    sed 's|/opt/chatd/bin/chatd|/bin/true|' "$unit" >"$copy/$unit"
done
# A drop-in changes how exposed a service is; that for a newer systemd is for one of these itself.
mkdir "$copy/local"
cp "$copy"/*.service "$copy"/*.socket "$copy/local"
mkdir "$copy/local/chatd.service.d"
cp drop-ins/50-local-only.conf "$copy/local/chatd.service.d"
for directory in "$copy" "$copy/local"; do
    said=$(systemd-analyze verify --man=no "$directory"/*.service "$directory"/*.socket 2>&1) || true
    if [ -n "$said" ]; then
        echo "$said" >&2
        exit 1
    fi
    systemd-analyze security --offline=true --threshold=10 --no-pager "$directory"/chatd.service | tail -1
done
