#!/usr/bin/env bash
# Runs all checks: format, lint, types, and the tests that are not marked `long`. `bash tests/run.sh unit` (or launch,
# faults, cluster, browser, benchmark) runs one kind of test instead, the long ones included.
set -euo pipefail
cd "$(dirname "$0")/.."

# `bash tests/run.sh gpu [--pretend] [--parts …]`: what needs a GPU, in 8 minutes (tests/gpu/kit.py). If there is a folder
# bundle, made by launch/bundle.sh, it is installed next to the machine's own torch, without network.
if [ "${1:-}" = gpu ]; then
    shift
    if [ -d bundle ]; then
        python3 -m pip install -q --no-index --no-deps --upgrade --target .bundle bundle/*.whl
        PATH=$PWD/.bundle/bin:$PATH PYTHONPATH=$PWD/.bundle:$PWD exec python3 -m tests.gpu.kit "$@"
    fi
    source launch/setup.sh dev
    exec python -m tests.gpu.kit "$@"
fi

echo "== install"
source launch/setup.sh dev
# Some tests open TensorBoard in Chromium, or start SLURM or ssh hosts. They are skipped if these are missing.
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
