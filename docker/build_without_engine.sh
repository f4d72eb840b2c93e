#!/usr/bin/env bash
# Builds docker/Dockerfile without a container engine or a registry, and runs the quickstart's first steps inside.
#
# Needs root on Debian, with buildah and debootstrap. The base image is made of Debian packages; the wheels are downloaded
# by this machine's pip beforehand. All files are removed afterwards.
set -euo pipefail
cd "$(dirname "$0")/.."

missing=()
for program in buildah debootstrap python3; do
    command -v $program > /dev/null || [ -x /usr/sbin/$program ] || missing+=($program)
done
if [ ${#missing[@]} -gt 0 ] || [ "$(id -u)" != 0 ]; then
    echo "skipped: needs root, and ${missing[*]:-nothing else}"
    exit 0
fi

work=$(mktemp -d)
container=""
store() { buildah --root "$work/store" --runroot "$work/run" --storage-driver vfs "$@"; }
clean() {
    [ -z "$container" ] || store rm "$container" > /dev/null
    store rmi --all --force > /dev/null 2>&1 || true
    rm -rf "$work"
}
trap clean EXIT
say() { printf '== %s (%d s)\n' "$1" $SECONDS; }

say "a base of Debian's packages"
mirror=$(cat /etc/apt/sources.list.d/debian.sources /etc/apt/sources.list 2> /dev/null |
    sed -n 's/^URIs: *//p; s/^deb \(\[[^]]*\] \)\?\([^ ]*\).*/\2/p' | sed -n 1p) || true
packages=python3,python3-venv,python3-dev,gcc,libc6-dev,ca-certificates
/usr/sbin/debootstrap --variant=minbase --include=$packages bookworm "$work/base" $mirror > "$work/log" || { tail "$work/log"; exit 1; }
rm -rf "$work"/base/var/cache/apt/archives/*.deb "$work"/base/var/lib/apt/lists/*
container=$(store from scratch)
store copy --quiet "$container" "$work/base" / > /dev/null
store commit --quiet "$container" localhost/base > /dev/null
store rm "$container" > /dev/null
container=""
rm -rf "$work/base"

say "what pip will install"
mkdir "$work/wheels" "$work/source"
cp -r pyproject.toml README.md LICENSE vaescale "$work/source"
pip download -qqq --python-version 3.11 --only-binary=:all: -d "$work/wheels" 'setuptools>=77' wheel pip
pip wheel -qqq -c launch/constraints.txt -w "$work/wheels" "$work/source[demo]"
rm -f "$work"/wheels/vaescale-*
printf '[global]\nno-index = true\nfind-links = /wheels\n' > "$work/pip.conf"

say "docker/Dockerfile"
store bud --isolation chroot --volume "$work/wheels:/wheels:ro" --volume "$work/pip.conf:/etc/pip.conf:ro" \
    --build-arg BASE_IMAGE=localhost/base -f docker/Dockerfile -t localhost/vaescale . > "$work/log" 2>&1 || { tail -n 30 "$work/log"; exit 1; }

say "inside"
container=$(store from localhost/vaescale)
inside() { store run --isolation chroot "$container" -- "$@"; }
check() { # a sentence, a command
    "${@:2}" > "$work/log" 2>&1 || { echo "FAIL: $1"; tail -n 30 "$work/log"; exit 1; }
    echo "ok: $1"
}
wanted=$(sed -n 's/^torch==\([^ ;]*\).*/\1/p' launch/constraints.txt | sed -n 1p)
torches='import pathlib, sys, torch
found = [path for path in sys.path if (pathlib.Path(path) / "torch" / "__init__.py").exists()]
assert len(found) == 1, found
assert torch.__version__.split("+")[0] == sys.argv[1], torch.__version__'
check "the user is trainer" inside sh -c '[ "$(id -un)" = trainer ]'
check "there is one torch, $wanted" inside python -c "$torches" "$wanted"
check "the entry point, deepspeed, starts launch/train.py" inside deepspeed launch/train.py --help
check "the demo's shards are written" inside python launch/shards.py demo data/photos
check "three steps of the quickstart are trained" inside python launch/run.py deepspeed launch/train.py \
    --config configs/quickstart.yaml steps=3 every.report=1
grep -E '^step|finished at step' "$work/log"
store images --format '{{.Name}} {{.Size}}' | sed 's/^/   /'
say "done"
