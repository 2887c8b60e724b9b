#!/bin/sh
# Boots the real systemd as the first process of namespaces of its own, over a copy of this machine's / that is gone
# with it: `boot.sh CHECKOUT CGROUP PLACE`, as root. In it chatd is installed as `make install` does.
set -eu
checkout=$1
cgroup=$2
place=$3

# A branch of the unified hierarchy for this systemd, which takes it for the whole tree.
mount -t cgroup2 cgroup2 "$place/cgroup"
mkdir -p "$place/cgroup/$cgroup"
echo 0 >"$place/cgroup/$cgroup/cgroup.procs"

exec unshare --cgroup --fork --pid --ipc --uts --mount --kill-child /bin/sh -eu -c '
checkout=$1
place=$2
mount -t tmpfs tmpfs "$place/machine"
cd "$place/machine"
mkdir upper work merged
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work merged
cd merged
mount --rbind /dev dev
mount -t proc proc proc
mount -t sysfs sysfs sys
mount -t cgroup2 cgroup2 sys/fs/cgroup
mount -t tmpfs tmpfs run
mount -t tmpfs -o mode=1777 tmpfs tmp
# What is installed here already is of no interest.
rm -rf opt/chatd etc/chatd etc/credstore usr/local/lib/systemd/system/chatd* etc/systemd/system/chatd* \
    var/lib/chatd var/lib/private/chatd

# With the network of outside, for pip.
mkdir -p mnt/checkout mnt/old
mount -o bind,ro "$checkout" mnt/checkout
chroot . /bin/sh -eu -c "cd /mnt/checkout && sh systemd/install.sh" >&2

# And from here without it.
exec unshare --net /bin/sh -eu -c "
    pivot_root . mnt/old
    umount -l /mnt/old
    # Else the directories of credentials, which systemd mounts for a service, never appear.
    mount --make-rshared /
    ip link set lo up
    ip addr add 192.0.2.1/24 dev lo
    exec env -i container=other PATH=/usr/sbin:/usr/bin:/sbin:/bin \\
        /lib/systemd/systemd --unit=basic.target --show-status=false --log-level=warning
"
' boot "$checkout" "$place"
