#!/bin/sh
# Inside namespaces of its own (tests/phone.py): adbd on the loopback of this network, with a small disk for /data.
set -eu
root=$1
disk=$2
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs -o "size=$disk" tmpfs "$root/data"
mount -t tmpfs tmpfs "$root/sdcard"
mkdir -p "$root/data/local/tmp" "$root/data/app"
"$root/usr/bin/busybox" ip link set lo up
exec chroot "$root" /usr/lib/android-sdk/platform-tools/adbd
