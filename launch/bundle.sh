#!/usr/bin/env bash
# Collects wheels for a machine without network that has torch and the usual scientific packages:
#     bash launch/bundle.sh OUT [PYTHON]      OUT: folder for the wheels; PYTHON: the version there, such as 3.12
# Copy the project and OUT there, and install with
#     pip install --no-index --no-deps OUT/*.whl && pip install --no-index --no-deps --no-build-isolation -e .
# Needs network and .venv here (launch/quickstart.sh or tests/run.sh make it). For x86-64 Linux.
set -euo pipefail
out=$(realpath -m "${1:?give a folder for the wheels}")
python=${2:-3.12}
cd "$(dirname "$0")/.."
mkdir -p "$out"

packages=(deepspeed webdataset omegaconf braceexpand hjson pydantic pydantic-core annotated-types typing-inspection
    simplejpeg xxhash)
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
for name in "${packages[@]}"; do
    pin=$(grep -E "^$name==[^;]*$" launch/constraints.txt)
    echo "   $pin"
    .venv/bin/pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$python" \
        --implementation cp "${platforms[@]}" -d "$out" "$pin" 2> /dev/null ||
        # There is only a source distribution: built without CUDA operations, the wheel holds Python files alone.
        DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv/bin/pip wheel -q --disable-pip-version-check --no-deps \
            --no-build-isolation -w "$out" "$pin"
done
du -sh "$out" | sed "s|\t.*|: $(ls "$out" | wc -l) wheels in $out|"
