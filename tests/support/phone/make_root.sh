#!/bin/sh
# A root folder in which Android's real adbd runs, for tests/phone.py: Debian trixie's adbd and its libraries, unpacked, mksh and busybox for
# everything else. Needs apt and dpkg-deb, not root: packages are fetched into the folder, nothing is installed. 30 MB, seconds.
set -eu
mkdir -p "$1"
root=$(cd "$1" && pwd)
here=$(cd "$(dirname "$0")" && pwd)
apt=$root.apt
mkdir -p "$apt/lists/partial" "$apt/archives/partial"
trap 'rm -rf "$apt"' EXIT
touch "$apt/status"

# the mirror that this machine uses anyway
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep -v security | sort -u | head -n 1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys] $mirror trixie main" > "$apt/sources.list"

apt_get() {
    apt-get -qq -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$apt/lists" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt" \
        -o Debug::NoLocking=1 -o APT::Sandbox::User= "$@"
}
apt_get update
apt_get --assume-yes --no-install-recommends --download-only install adbd busybox-static mksh

for package in "$apt"/archives/*.deb; do
    dpkg-deb --extract "$package" "$root"
done
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
