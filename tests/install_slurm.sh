#!/bin/bash
# Installs the Debian packages of the tests' Slurm, and those named as arguments, where this is root on Debian or Ubuntu and they are missing.
# Elsewhere it says why not and succeeds: pytest skips those tests, with the reason.
set -euo pipefail
packages=(slurmctld slurmd slurm-client munge slurmdbd mariadb-server-core mariadb-client-core slurm-wlm-mysql-plugin iproute2 "$@")
if ! command -v apt-get dpkg >/dev/null; then
  echo "no apt-get: the tests on a real Slurm will be skipped" >&2
  exit 0
fi
missing=()
for package in "${packages[@]}"; do
  if ! dpkg -s "$package" >/dev/null 2>&1; then missing+=("$package"); fi
done
if [ ${#missing[@]} -eq 0 ]; then exit 0; fi
if [ "$(id -u)" -ne 0 ]; then
  echo "not root: the tests on a real Slurm will be skipped; they need ${missing[*]}" >&2
  exit 0
fi
export DEBIAN_FRONTEND=noninteractive
{ apt-get update --quiet && apt-get install --quiet --yes --no-install-recommends "${missing[@]}"; } >/tmp/muster-apt.log 2>&1 || {
  tail -5 /tmp/muster-apt.log >&2
  echo "could not install ${missing[*]}: the tests on a real Slurm will be skipped" >&2
}
