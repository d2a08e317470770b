#!/bin/sh
# Unpack packages of Debian trixie into a folder, for programs that are run from there: `debian.sh FOLDER ARCHITECTURES APT_GET...`,
# where the last arguments are a command of apt-get's that leaves packages in its archives. Needs apt and dpkg-deb, not root:
# nothing is installed.
set -eu
mkdir -p "$1"
folder=$(cd "$1" && pwd)
architectures=$2
shift 2
apt=$folder.apt
mkdir -p "$apt/lists/partial" "$apt/archives/partial"
trap 'rm -rf "$apt"' EXIT
touch "$apt/status"

# the mirror that this machine uses anyway
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep debian | grep -v security | sort -u | head -n 1)
keys=/usr/share/keyrings/debian-archive-keyring.gpg
echo "deb [signed-by=$keys arch=$architectures] $mirror trixie main" > "$apt/sources.list"

apt_get() {
    apt-get -qq -o Dir::Etc::sourcelist="$apt/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$apt/lists" -o Dir::State::status="$apt/status" -o Dir::Cache="$apt" \
        -o APT::Architectures="$architectures" -o Debug::NoLocking=1 -o APT::Sandbox::User= "$@"
}
apt_get update
cd "$apt/archives" # where `download` leaves packages
apt_get "$@"
for package in *.deb; do
    dpkg-deb --extract "$package" "$folder"
done
