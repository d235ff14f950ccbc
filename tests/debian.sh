#!/usr/bin/env bash
# Installs what the tests need of Debian: promtool and prometheus, which check dashboards, rules and metrics,
# systemd-analyze, which checks units, Chromium, in which reports are read, zsh and fish, which complete commands, and the
# compilers and libraries with which Go, Java and Python of no package of ours call the services (tests/clients.sh): some
# 200 MB to fetch, 900 MB on disk.
set -euo pipefail
packages=(prometheus systemd openssl chromium fonts-dejavu-core zsh fish)
packages+=(protobuf-compiler protobuf-compiler-grpc)
packages+=(golang-go protoc-gen-go protoc-gen-go-grpc golang-google-grpc-dev
  golang-google-protobuf-dev golang-github-golang-protobuf-1-5-dev golang-google-genproto-dev)
packages+=(default-jdk-headless protobuf-compiler-grpc-java-plugin libgrpc-java libprotobuf-java libnetty-java
  libguava-java libgoogle-gson-java libperfmark-java libgoogle-common-protos-java libgeronimo-annotation-1.3-spec-java)
installed=$(dpkg-query --show --showformat '${db:Status-Status}\n' "${packages[@]}" 2> /dev/null | grep -cx installed || true)
if [ "$installed" = "${#packages[@]}" ]; then
  exit 0
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
  as_root=(sudo -n)
fi
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -qq -y --no-install-recommends "${packages[@]}" > /dev/null
