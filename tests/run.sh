#!/usr/bin/env bash
# Everything that must hold: format, lint, types, tests. `bash tests/run.sh unit` (launch, faults, cluster, browser,
# benchmark) runs one kind, and of it those too that take long.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "== install"
source launch/setup.sh dev
# TensorBoard is opened in Debian's Chromium, and SLURM and ssh hosts are started: where those cannot be had, such tests
# are skipped, and pytest says so.
packages=()
command -v chromedriver > /dev/null || packages+=(chromium chromium-driver)
[ -x /usr/sbin/slurmctld ] || packages+=(slurmctld slurmd slurm-client munge)
[ -x /usr/sbin/sshd ] || packages+=(openssh-server openssh-client)
command -v pdsh > /dev/null || packages+=(pdsh)
if [ ${#packages[@]} -gt 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "   installing ${packages[*]}"
    apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${packages[@]}" > /dev/null ||
        echo "   they could not be installed: tests that need them will be skipped"
fi

echo "== format"
ruff format --check .
echo "== lint"
ruff check .
echo "== types"
mypy
echo "== tests"
pytest -m "${1:-not long}"
