#!/bin/bash
# Installs what `make screenshots` needs: Chromium, npm and pngquant from Debian, and from npm Playwright's driver and axe-core into the folder $1.
# Says what is missing, and fails, where it cannot.
set -euo pipefail
target=$1
packages=()
command -v chromium >/dev/null || packages+=(chromium fonts-dejavu-core)
command -v npm >/dev/null || packages+=(npm)
command -v pngquant >/dev/null || packages+=(pngquant)
if [ ${#packages[@]} -gt 0 ]; then
  if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null; then
    echo "the pictures need ${packages[*]}: install them with your package manager (on Debian, as root: apt-get install ${packages[*]})" >&2
    exit 1
  fi
  export DEBIAN_FRONTEND=noninteractive
  { apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends "${packages[@]}"; } >/tmp/muster-apt.log 2>&1 || {
    tail -5 /tmp/muster-apt.log >&2
    echo "apt-get could not install ${packages[*]}" >&2
    exit 1
  }
fi
mkdir -p "$target"
npm install --prefix "$target" --no-audit --no-fund --no-save --silent playwright-core@1.65.1 axe-core@4.14.1 || {
  echo "npm could not install playwright-core and axe-core" >&2
  exit 1
}
