#!/bin/sh
# A root folder in which Android's real adbd runs, for tests/phone.py: Debian trixie's adbd and its libraries, unpacked, mksh and busybox for
# everything else. Needs apt and dpkg-deb, not root: packages are fetched into the folder, nothing is installed. 30 MB, seconds.
set -eu
mkdir -p "$1"
root=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
"$(dirname "$0")/../../../tools/debian.sh" "$root" amd64 \
    install --assume-yes --no-install-recommends --download-only adbd busybox-static mksh
for folder in bin sbin lib lib64; do
    ln -sfn "usr/$folder" "$root/$folder"
done
# Android's own shell; busybox's would run its own programs before the stand-ins
ln -sfn mksh "$root/usr/bin/sh"
for applet in $("$root/usr/bin/busybox" --list); do
    [ -e "$root/usr/bin/$applet" ] || ln -s busybox "$root/usr/bin/$applet"
done
mkdir -p "$root/dev" "$root/proc" "$root/data" "$root/sdcard"
# what a phone has and Debian has not: stand-ins, which replace busybox's where it has one of that name
cp --remove-destination "$here"/system/* "$root/usr/bin/"
