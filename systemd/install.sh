#!/bin/sh
# Installs chatd as a systemd service, or brings an installed one up to date: `make install`, as root, in a checkout.
#   /opt/chatd                              a virtual environment
#   /usr/local/lib/systemd/system/chatd*    the units; changes belong in drop-ins, systemctl edit chatd
#   /etc/sysctl.d/60-chatd.conf             limits of the kernel
#   /etc/chatd/chatd.toml                   the configuration, kept if there is one
#   /etc/credstore/chatd.api.internal_token the backend's token, made if there is none
set -eu
cd "$(dirname "$0")/.."

prefix=/opt/chatd
python=${PYTHON:-/usr/bin/python3}

fail() {
    echo "$*" >&2
    exit 1
}

[ "$(id -u)" -eq 0 ] || fail "Run it as root: sudo make install"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "chatd needs Python 3.11 or newer, which $python is not. Name another: make install PYTHON=/usr/bin/python3.12"
case $(readlink -f "$(command -v "$python")") in
    /home/* | /root/*) fail "$python lies in a home directory, which the service cannot see. Name another: PYTHON=/usr/bin/python3" ;;
esac
"$python" -c 'import ensurepip' 2>/dev/null || fail "Missing: apt-get install python3-venv"

echo "Installing chatd and its libraries into $prefix …"
# An environment whose Python has gone, or is another since the system was upgraded, is made anew.
$prefix/bin/python -m pip --version >/dev/null 2>&1 || "$python" -m venv --clear $prefix
# From a copy: pip builds where the sources are, as root, and takes along what an older build left there.
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
cp -R chatd clients pyproject.toml README.md LICENSE "$copy"
$prefix/bin/python -m pip install --quiet --disable-pip-version-check --no-input --upgrade "$copy"

# Not /etc/systemd/system: there no unit can be masked.
units=/usr/local/lib/systemd/system
install -d $units /etc/sysctl.d /etc/chatd
install -m 644 systemd/*.service systemd/*.socket systemd/*.target $units
install -m 644 systemd/60-chatd.conf /etc/sysctl.d
[ -e /etc/chatd/chatd.toml ] || install -m 644 chatd.toml /etc/chatd/chatd.toml
install -d -m 700 /etc/credstore
token=/etc/credstore/chatd.api.internal_token
[ -e $token ] || (umask 077 && $prefix/bin/python -c 'import secrets; print(secrets.token_hex(32))' >$token)
if [ -d /run/systemd/system ]; then
    systemctl daemon-reload
fi

cat <<END
Installed $($prefix/bin/chatd --version).

  sysctl --system                       the kernel's limits
  systemctl enable --now chatd          start it, now and at boot; after an upgrade: systemctl restart chatd
  cd /var/lib/chatd && CHATD_API__INTERNAL_TOKEN_FILE=$token \\
    /opt/chatd/bin/chatd doctor --config /etc/chatd/chatd.toml

Your backend sends the content of $token as X-Internal-Token.
END
