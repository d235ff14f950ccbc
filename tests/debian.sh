#!/usr/bin/env bash
# Installs what the tests need of Debian: promtool and prometheus, which check dashboards, rules and metrics, and
# systemd-analyze, which checks units.
set -euo pipefail
if command -v promtool >/dev/null && command -v prometheus >/dev/null && command -v systemd-analyze >/dev/null; then
  exit 0
fi
as_root=()
if [ "$(id -u)" != 0 ]; then
  as_root=(sudo -n)
fi
"${as_root[@]}" apt-get update -qq
DEBIAN_FRONTEND=noninteractive "${as_root[@]}" apt-get install -qq -y --no-install-recommends prometheus systemd >/dev/null
