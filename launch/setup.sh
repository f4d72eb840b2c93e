# Sourced, from the project's root, as: source launch/setup.sh EXTRA
# Makes .venv and installs the project with that extra in the tested versions, unless this has been done.

setup() {
    local extra=$1 python="" name want
    for name in python3.11 python3.12 python3.10 python3; do
        if "$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null; then
            python=$name
            break
        fi
    done
    if [ -z "$python" ]; then
        echo "error: Python 3.10, 3.11 or 3.12 is needed and none is on the PATH: install one and run this again" >&2
        return 1
    fi
    if [ ! -x .venv/bin/pip ]; then
        echo "   making .venv with $("$python" --version)"
        if ! "$python" -m venv .venv; then
            rm -rf .venv
            echo "error: $python cannot make a virtual environment: install its venv package (Debian: apt-get install python3-venv)" >&2
            return 1
        fi
    fi
    want=$(cat pyproject.toml launch/constraints.txt | sha256sum)
    if [ "$(cat ".venv/installed-$extra" 2>/dev/null)" != "$want" ]; then
        echo "   installing vaescale[$extra] into .venv (a few minutes the first time)"
        .venv/bin/python -m pip install --disable-pip-version-check -c launch/constraints.txt -e ".[$extra]" \
            > .venv/install.log 2>&1 &
        watch_install $! || return 1
        echo "$want" > ".venv/installed-$extra"
    fi
    PATH=$PWD/.venv/bin:$PATH
}

# Print one line per package while pip works, and its errors if it fails.
watch_install() {
    tail -n +1 -F --pid="$1" .venv/install.log 2>/dev/null | sed -un 's/^Collecting \([^ ]*\).*/     \1/p; s/^Installing collected.*/     unpacking/p'
    if ! wait "$1"; then
        grep -E '^(error|ERROR)' .venv/install.log >&2
        echo "error: the installation failed: .venv/install.log has all of its output; fix the cause and run this again" >&2
        return 1
    fi
}

setup "$1"
