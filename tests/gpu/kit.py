"""Everything that needs a GPU, in at most 8 minutes on one and without network: `bash tests/run.sh gpu [--pretend]`.

Each part runs in a process of its own and within its own limit, so that what fails or hangs costs no other part.
OUT/report.json has each part's results, or its error; OUT/report.md says the same to people. --pretend runs all parts
on the CPU at their smallest scale; what needs CUDA is left out and said. Exit code: 1 if a part failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tests.gpu.parts import PARTS, Part

ROOT = Path(__file__).parents[2]
TAIL = 3000  # characters of output that a failed part's entry keeps


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--pretend", action="store_true", help="on the CPU, at the smallest scale")
    given = parser.parse_args()
    given.out = given.out.resolve()
    given.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {}
    chosen = {*(given.parts or [part.name for part in PARTS])}
    if "families" in chosen:
        chosen.add("reference")
    for part in PARTS:
        if part.name not in chosen:
            continue
        print(f"== {part.name} (at most {part.limit} s)", flush=True)
        begun = time.monotonic()
        report[part.name] = {**run(part, given.out, given.pretend), "seconds": round(time.monotonic() - begun, 1)}
        write(report, given.out)  # after each part: the machine may be taken away
        print(f"   {report[part.name].get('error', 'done').splitlines()[-1]}", flush=True)
    print((given.out / "report.md").read_text())
    return int(any("error" in entry for entry in report.values()))


def run(part: Part, out: Path, pretend: bool) -> dict[str, Any]:
    result = out / f"{part.name}.json"
    result.unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    if pretend or part.on_cpu:
        environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.parts", part.name, str(out), str(int(pretend))]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=part.limit, check=False
        )
    except subprocess.TimeoutExpired as late:
        return {"error": f"{str(late.stdout or '')[-TAIL:]}\nnot done within {part.limit} s"}
    if done.returncode or not result.exists():
        return {"error": f"{(done.stdout + done.stderr)[-TAIL:]}\nexit code {done.returncode}"}
    found: dict[str, Any] = json.loads(result.read_text())
    result.unlink()
    return found


def write(report: dict[str, Any], out: Path) -> None:
    (out / "report.json").write_text(json.dumps(report, indent=1))
    lines = ["# GPU report", ""]
    for name, entry in report.items():
        lines += [f"## {name} ({entry['seconds']} s)", ""]
        if "error" in entry:
            lines += ["failed:", "", *(f"    {line}" for line in entry["error"].splitlines()), ""]
            continue
        for key, value in entry.items():
            if key == "seconds":
                continue
            if isinstance(value, dict):
                lines += [f"- {key}:", *(f"  - {inner}: {shown(one)}" for inner, one in value.items())]
            else:
                lines.append(f"- {key}: {shown(value)}")
        lines.append("")
    (out / "report.md").write_text("\n".join(lines))


def shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    text = str(value)
    return "\n\n" + "\n".join(f"      {line}" for line in text.splitlines()) + "\n" if "\n" in text else text


if __name__ == "__main__":
    sys.exit(main())
