"""Everything that needs a GPU, in at most 8 minutes on one and without network: `bash tests/run.sh gpu [--pretend]`.

Each part runs in its own process with a time limit, so a part that fails or hangs does not affect the others. Parts
that check run at the same time on machines with many cores; parts that measure run alone.
OUT/report.json has each part's results, or its error; OUT/report.md has the same for people, and says where the numbers
belong; OUT/output.txt has the output of all parts. --pretend runs all parts on the CPU at their smallest scale; parts
that need CUDA are skipped, and the report says so. Exit code: 1 if a part failed.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any

from tests.gpu.common import ALONE, FAILED, FIRST, ROOT, TOGETHER, Part
from tests.gpu.parts import PARTS

TOTAL = 470  # seconds of all parts together
LEAST = 10  # a part needs at least this many seconds
CORES = 3  # for each of the parts that run at the same time
TAIL = 3000  # characters of output that a failed part's entry keeps
# Where libraries keep what they compile: by default in the home folder, which may be read-only or slow.
CACHES = ("TRITON_HOME", "TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "TORCH_EXTENSIONS_DIR", "XDG_CACHE_HOME")

Report = dict[str, dict[str, Any]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/gpu")))
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--pretend", action="store_true", help="on the CPU, at the smallest scale")
    given = parser.parse_args()
    out = given.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "output.txt").unlink(missing_ok=True)
    chosen = {*(given.parts or [part.name for part in PARTS])}
    if "families" in chosen:
        chosen.add("reference")
    report: Report = {}
    ends, lock = time.monotonic() + TOTAL, Lock()

    def done(part: Part) -> None:
        left, begun = ends - time.monotonic(), time.monotonic()
        limit = int(min(part.limit, left))
        found = run(part, out, given.pretend, limit) if left >= LEAST else {"error": f"not begun: {TOTAL} s are over"}
        with lock:
            report[part.name] = {**found, "seconds": round(time.monotonic() - begun, 1)}
            write(report, out)  # after each part: the machine may be taken away
        print(f"{part.name}: {state(report[part.name])}, {report[part.name]['seconds']} s", flush=True)

    for stage, most in ((FIRST, 1), (TOGETHER, max(1, len(os.sched_getaffinity(0)) // CORES)), (ALONE, 1)):
        with ThreadPoolExecutor(most) as pool:
            list(pool.map(done, [part for part in PARTS if part.stage == stage and part.name in chosen]))
    print("\n" + (out / "report.md").read_text())
    return int(any(state(entry) == "FAILED" for entry in report.values()))


def run(part: Part, out: Path, pretend: bool, limit: int) -> dict[str, Any]:
    """Returns the part's results, also those before it failed, and then an "error", too."""
    result, output = out / f"{part.name}.json", out / f"{part.name}.txt"
    result.unlink(missing_ok=True)
    command = [sys.executable, "-W", "ignore", "-m", "tests.gpu.parts", part.name, str(out), str(int(pretend))]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as caches, output.open("wb") as log:
        environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
        environment |= {name: f"{caches}/{name.lower()}" for name in CACHES}
        if pretend or part.on_cpu:
            # One thread: small models, and many cores. DeepSpeed would otherwise use the accelerator of this process.
            environment |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = process.wait(limit)
            why = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            why = f"not done within {limit} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and what it has started
            process.wait()
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    result.unlink(missing_ok=True)
    with (out / "output.txt").open("a") as log:  # of all parts: some places take few files back
        log.write(f"== {part.name}\n{output.read_text(errors='replace')}\n")
    if why or not found:
        tail = output.read_text(errors="replace")[-TAIL:].strip()
        found["error"] = f"{tail}\n{why or 'no results'}".strip()
    output.unlink()
    return found


def state(entry: dict[str, Any]) -> str:
    if "error" in entry or any(str(value).startswith(FAILED) for value in entry.values()):
        return "FAILED"
    return "left out" if "left out" in entry else "ok"


def write(report: Report, out: Path) -> None:
    partial = out / "report.partial"  # because parts read the report
    partial.write_text(json.dumps(report, indent=1))
    partial.replace(out / "report.json")
    lines = ["# GPU report", "", "| part | state | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {state(entry)} | {entry['seconds']} |" for name, entry in report.items()]
    for part in PARTS:
        if part.name not in report:
            continue
        entry = {key: value for key, value in report[part.name].items() if key != "seconds"}
        lines += ["", f"## {part.name}", "", (part.work.__doc__ or "").strip(), ""]
        error = entry.pop("error", "")
        short = {key: shown(value) for key, value in entry.items() if "\n" not in str(value).strip()}
        if short:
            lines += ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in short.items())]
        for key, value in entry.items():
            if key not in short:
                lines += ["", f"{key}:", "", *quoted(str(value))]
        if error:
            lines += ["", "It ended early:", "", *(f"    {line}" for line in error.splitlines())]
        if part.then:
            lines += ["", f"What to do with it: {part.then}"]
    (out / "report.md").write_text("\n".join(lines) + "\n")


def shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(shown, value))
    return f"{value:.4g}" if isinstance(value, float) else str(value).strip().replace("|", "\\|")


def quoted(text: str) -> list[str]:
    """Returns a text of several lines: tables as they are, the rest as code."""
    if text.startswith(FAILED):
        return [f"    {line}" for line in text.splitlines()]
    return text.strip().splitlines()


if __name__ == "__main__":
    sys.exit(main())
