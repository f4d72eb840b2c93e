#!/usr/bin/env bash
# Runs all checks: format, lint, types, and the tests that are not marked `long`. `bash tests/run.sh unit` (or launch,
# faults, cluster, browser, benchmark) runs one kind of test instead, the long ones included.
set -euo pipefail
cd "$(dirname "$0")/.."

# `bash tests/run.sh gpu [--pretend] [--parts …]`: what needs a GPU, in 8 minutes (tests/gpu/kit.py). If there is a folder
# bundle, made by launch/bundle.sh, packages that the machine lacks come from it, without network, and are put into the
# folder .bundle.
if [ "${1:-}" = gpu ]; then
    shift
    if [ -d bundle ]; then
        pip=$(echo bundle/pip-*.whl)
        offline() { # pip of the bundle, which no setting of this machine sends to a network
            PIP_CONFIG_FILE=/dev/null python3 "$pip/pip" --isolated --no-cache-dir "$@" --no-index --find-links bundle
        }
        rm -rf .bundle
        # All of it where pip cannot say what is missing, as for a torch whose own packages it does not know.
        missing=$(echo bundle/*.whl)
        if report=$(offline install -q --dry-run --report - '.[kit]'); then
            missing=$(python3 -c '
import json, sys
found = json.load(sys.stdin)["install"]
print(*(one["download_info"]["url"] for one in found if one["metadata"]["name"] != "vaescale"))' <<< "$report")
        fi
        [ -z "$missing" ] || offline install -q --no-deps --no-compile --target .bundle $missing
        PATH=$PWD/.bundle/bin:$PATH PYTHONPATH=$PWD/.bundle:$PWD exec python3 -m tests.gpu.kit "$@"
    fi
    source launch/setup.sh dev
    exec python -m tests.gpu.kit "$@"
fi

echo "== install"
source launch/setup.sh dev
# Tests compare with these. They require torchvision, which does not import next to a CPU build of torch, and run without.
python -c 'import importlib.util as util, sys; sys.exit(not all(map(util.find_spec, ("lpips", "torch_fidelity"))))' ||
    python -m pip install -q --disable-pip-version-check --no-deps lpips==0.1.4 torch-fidelity==0.4.0
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
OMP_NUM_THREADS=1 pytest -n 2 --dist loadfile -m "${1:-not long}" # two files at a time
