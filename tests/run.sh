#!/usr/bin/env bash
# Everything that must hold: format, lint, types, tests. `bash tests/run.sh unit` (launch, faults, browser, benchmark) runs one kind,
# and of that kind those too that take long.
set -euo pipefail
cd "$(dirname "$0")/.."

echo "== install"
source launch/setup.sh dev
# The browser test opens TensorBoard in Debian's Chromium; without one it is skipped, and pytest says so.
if ! command -v chromedriver > /dev/null && [ "$(id -u)" = 0 ] && command -v apt-get > /dev/null; then
    echo "   installing chromium and chromium-driver"
    apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver > /dev/null ||
        echo "   chromium could not be installed: the browser test will be skipped"
fi

echo "== format"
ruff format --check .
echo "== lint"
ruff check .
echo "== types"
mypy
echo "== tests"
pytest -m "${1:-not long}"
