#!/usr/bin/env bash
# Collects wheels for a machine without network that has Python, torch and numpy (40 MiB, for x86-64 Linux):
#     bash launch/bundle.sh OUT [PYTHON]      OUT: folder for the wheels; PYTHON: the version there, such as 3.12
#     bash launch/bundle.sh --list [PYTHON]   prints the names and versions only
# Copy the project and OUT to that machine, and install it there with the packages that it lacks:
#     python3 -m pip install --no-index --find-links OUT -e .
# Needs network and .venv here (launch/quickstart.sh or tests/run.sh make it).
set -euo pipefail
[ "${1:-}" = --list ] || out=$(realpath -m "${1:?give a folder for the wheels}")
python=${2:-3.12}
cd "$(dirname "$0")/.."

# Prints the pinned versions of what vaescale[kit] needs on that Python, except torch and numpy and what only they need.
pins() {
    .venv/bin/python - "$python" <<'END'
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

there = {"python_version": sys.argv[1], "python_full_version": f"{sys.argv[1]}.0"}
constraints = [Requirement(line) for line in Path("launch/constraints.txt").read_text().splitlines() if line[0] != "#"]
pinned = {pin.name: pin for pin in constraints if not pin.marker or pin.marker.evaluate(there)}
project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
extras = project["optional-dependencies"]
todo = [Requirement(text) for text in [*project["dependencies"], *extras["turbo"], *extras["kit"][1:]]]
found = {"torch", "numpy", "setuptools"}
while todo:
    name, wanted = canonicalize_name(todo[-1].name), todo.pop()
    if name in found or (wanted.marker and not wanted.marker.evaluate(there | {"extra": ""})):
        continue
    found.add(name)
    print(pinned[name].name + str(pinned[name].specifier))
    try:
        todo += map(Requirement, metadata.requires(name) or [])
    except metadata.PackageNotFoundError:  # needed by other versions of Python only
        pass
END
}

wanted=$(pins | sort)
if [ "$1" = --list ]; then
    echo "$wanted"
    exit
fi
mkdir -p "$out"
platforms=()
for tag in manylinux_2_28 manylinux_2_27 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${tag}_x86_64")
done
# pip runs from its own wheel, so that an old one or none on that machine does not matter; setuptools builds vaescale.
.venv/bin/pip download -q --disable-pip-version-check --no-deps --only-binary=:all: --python-version "$python" \
    --implementation cp "${platforms[@]}" -d "$out" $(grep -v ^deepspeed <<< "$wanted") pip 'setuptools>=77'
# DeepSpeed has only a source distribution: built without CUDA operations, its wheel holds Python files alone.
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu .venv/bin/pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation \
    -w "$out" "$(grep ^deepspeed <<< "$wanted")"
du -sh "$out" | sed "s|\t.*|: $(ls "$out" | wc -l) wheels in $out|"
