#!/bin/sh
# Installs the Debian packages that the tests need and this machine lacks, or those named as arguments.
# Nothing is started: the tests run servers of their own.
set -eu

missing() {
    command -v redis-server >/dev/null || echo redis-server
    ls /usr/lib/postgresql/*/bin/postgres >/dev/null 2>&1 || echo postgresql
    PATH=$PATH:/usr/sbin:/sbin command -v pgbouncer >/dev/null || echo pgbouncer
    command -v chromium >/dev/null || echo chromium
    PATH=$PATH:/usr/sbin:/sbin command -v nginx >/dev/null || echo nginx-light
    command -v openssl >/dev/null || echo openssl
    command -v curl >/dev/null || echo curl
    command -v php >/dev/null || echo php-cli
    command -v phpunit >/dev/null || echo phpunit
    # What an application in Laravel has: the framework's parts, its clients of Redis, of HTTP, and a database.
    [ -d /usr/share/php/Laravel/Lumen ] || echo php-laravel-lumen-framework
    [ -d /usr/share/php/Illuminate/Redis ] || echo php-illuminate-redis
    [ -d /usr/share/php/Predis ] || echo php-predis
    [ -d /usr/share/php/GuzzleHttp ] || echo php-guzzlehttp-guzzle
    ls /usr/lib/php/*/redis.so >/dev/null 2>&1 || echo php-redis
    ls /usr/lib/php/*/pdo_sqlite.so >/dev/null 2>&1 || echo php-sqlite3
    # The fault suite: packets dropped, an interface brought up, a clock put forward.
    PATH=$PATH:/usr/sbin:/sbin command -v nft >/dev/null || echo nftables
    PATH=$PATH:/usr/sbin:/sbin command -v ip >/dev/null || echo iproute2
    ls /usr/lib/*/faketime/libfaketime.so.1 >/dev/null 2>&1 || echo faketime
}

packages=${*:-$(missing | xargs)}
[ -n "$packages" ] || exit 0

install="apt-get install --no-install-recommends $packages"
if ! command -v apt-get >/dev/null; then
    echo "Missing: $packages (Debian's names). Install them with this system's package manager, then try again." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "Missing: $packages. Install with: sudo $install" >&2
    exit 1
fi

# invoke-rc.d asks this program before it starts a service; 101 forbids. One that is there already stays.
policy=/usr/sbin/policy-rc.d
if [ ! -e "$policy" ]; then
    trap 'rm -f "$policy"' EXIT
    trap 'exit 1' HUP INT TERM
    printf '#!/bin/sh\nexit 101\n' >"$policy"
    chmod 755 "$policy"
fi

echo "Installing $packages with apt-get …"
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq || echo "apt-get update failed; trying with the package lists there are." >&2
# Another apt may be at work (unattended-upgrades on a new machine): wait for it, 300 s at most.
$install -qq --yes -o Dpkg::Use-Pty=0 -o DPkg::Lock::Timeout=300 </dev/null
