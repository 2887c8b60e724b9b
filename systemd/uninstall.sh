#!/bin/sh
# Takes away what systemd/install.sh has installed: `make uninstall`, as root. What is yours stays, and is named.
set -eu

if [ "$(id -u)" -ne 0 ]; then
    echo "Run it as root: sudo make uninstall" >&2
    exit 1
fi
if [ -d /run/systemd/system ]; then
    systemctl disable --now chatd.socket chatd-api.socket chatd || true # not installed
fi
for unit in chatd.service chatd.socket chatd-api.socket chatd-misconfigured.target; do
    rm -f "/usr/local/lib/systemd/system/$unit"
done
rm -rf /opt/chatd /etc/sysctl.d/60-chatd.conf
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi
echo "Removed. Kept, if they are there: /etc/chatd, /etc/credstore/chatd.*, /var/lib/chatd (the messages), drop-ins."
