"""Diagnoses a run from its run directory: its status, and why it stalled, diverged or collapsed.

Each function reads one aspect and returns its findings. Nothing is written, and no process group is needed.
"""

import re
import time
from pathlib import Path
from statistics import median
from typing import Any

from ..files import printable
from ..lifecycle import checkpoint
from ..lifecycle.checkpoint import CheckpointError
from ..lifecycle.pace import SLOW
from ..lifecycle.status import FAILED, FINISHED, NO_PROGRESS, PREEMPTED, RUNNING, Status
from ..lifecycle.watch import STACKS
from ..monitoring.board import METRICS, read_alarms, read_lines
from .preflight import FAIL, OK, WARN, Finding

LATE = 10  # multiple of the usual time between reports after which a silent run counts as dead or hung
PATIENT = 600.0  # seconds of silence that never count, because validation writes no reports
LAST = 20  # reports that make up the current state
WAITS = 0.3  # share of time spent waiting for data above which there is a finding
SKIPPED = 0.05  # share of skipped steps above which there is a finding
WORSE = 1.5  # multiple of the lowest loss above which the run may diverge
FEWER = 0.5  # share of the usual images per second below which there is a finding

Metrics = list[dict[str, Any]]


def diagnose(run: Path) -> list[Finding]:
    metrics = read_metrics(run)
    parts = [status(run, metrics), stacks(run), checkpoints(run), losses(metrics), alarms(run, metrics), speed(metrics)]
    return [finding for part in parts for finding in part]


def read_metrics(run: Path) -> Metrics:
    """Returns the lines of metrics.jsonl, one dict per report or validation, without damaged ones; [] if there is no
    file."""
    try:
        return [values for _, values in read_lines(run / METRICS)]
    except OSError:
        return []


def status(run: Path, metrics: Metrics) -> list[Finding]:
    said = Status(run, 0).read()
    how, why, step = said.get("status"), printable(said.get("why")), said.get("step")
    if how is None:
        return [
            Finding(FAIL, f"{run} has no run_status.json: it is not a run directory, or no training has started in it")
        ]
    if how == FINISHED:
        return [Finding(OK, f"finished at step {step}")]
    if how == PREEMPTED:
        return [Finding(OK, f"stopped at step {step} ({why})", "run the same command to continue")]
    if how == RUNNING:
        return [_running(run, metrics, step)]
    times = len(said.get("failures", []))
    where = f"failed at step {step} on rank {said.get('rank')}{f', {times} times in a row' if times > 1 else ''}"
    if how == NO_PROGRESS:
        return [Finding(FAIL, f"{where}: {why}", "another attempt would fail in the same way: fix the cause first")]
    return [Finding(FAIL if how == FAILED else WARN, f"{where}: {why}")]


def _running(run: Path, metrics: Metrics, step: Any) -> Finding:
    reports = _of(metrics, "perf/seconds_per_step")
    if len(reports) < 2:
        return Finding(OK, f"started at step {step}; too few reports so far to say more")
    between = (reports[-1][0] - reports[-2][0]) * reports[-1][1]
    silent = time.time() - (run / METRICS).stat().st_mtime
    what = f"running at step {reports[-1][0]}, the last report {silent:.0f} s ago, usually one every {between:.3g} s"
    if silent < max(PATIENT, LATE * between):
        return Finding(OK, what)
    return Finding(
        FAIL, what, "it hangs, or was killed without a trace: read the end of its log, then run the same command"
    )


def stacks(run: Path) -> list[Finding]:
    """Returns where each rank was when the run hung, and which ranks left no stacks."""
    files = sorted((run / STACKS).glob("rank-*.txt"))
    heads = [printable(file.read_text(errors="replace").partition("\n")[0]) for file in files if file.is_file()]
    if not heads:
        return []
    found = [Finding(WARN, f"it hung: {head}") for head in heads]
    world = re.match(r"rank \d+ of (\d{1,6}):", heads[0])
    if not world:  # for example because the disk was full
        return found
    missing = [rank for rank in range(int(world[1])) if run / STACKS / f"rank-{rank}.txt" not in files]
    if missing:
        ranks = ", ".join(map(str, missing))
        found.append(Finding(WARN, f"rank {ranks} left no stacks", "check its node and the kernel log there"))
    else:
        found.append(
            Finding(
                WARN,
                "the rank whose stacks differ from the others' is the likely cause",
                f"compare the files in {run / STACKS}",
            )
        )
    return found


def checkpoints(run: Path) -> list[Finding]:
    folder = run / "checkpoints"
    found = [
        Finding(WARN, f"{path.name} is damaged ({'; '.join(wrong)})", "the next older one is used")
        for path in checkpoint.there(folder)
        if (wrong := checkpoint.verify(path))
    ]
    try:
        newest = checkpoint.newest(folder)
    except CheckpointError as error:
        return [*found, Finding(FAIL, str(error))]
    if newest.path is None:
        return [Finding(WARN, "there is no checkpoint yet", "to lose less, lower every.checkpoint")]
    return [*found, Finding(OK, f"the same command continues from {newest.path.name}")]


def losses(metrics: Metrics) -> list[Finding]:
    """Returns findings on divergence, and on skipped steps."""
    slower = "lower optimizer.lr or raise optimizer.warmup_steps"
    lines = [line for line in metrics if "train/loss" in line]
    if not lines:
        return []
    found = []
    finite = [line["train/loss"] for line in lines if line["train/loss"] is not None]
    if lines[-1]["train/loss"] is None:
        found.append(Finding(FAIL, f"the loss is not finite at step {lines[-1]['step']}", slower))
    elif len(finite) > LAST:
        now, spread = median(finite[-LAST:]), max(finite) - min(finite)
        best = min(median(finite[i : i + LAST]) for i in range(len(finite) - LAST + 1))
        if now > WORSE * best > 0 and now - best > 0.1 * spread:
            found.append(
                Finding(WARN, f"the loss diverges: it is {now:.4g} now and was {best:.4g} at its best", slower)
            )
    skipped = [line["optim/skipped"] for line in lines[-LAST:] if line.get("optim/skipped") is not None]
    if skipped and sum(skipped) / len(skipped) > SKIPPED:
        kinds = {name.rpartition("skipped_")[2]: value for name, value in lines[-1].items() if "/skipped_" in name}
        what = ", ".join(f"{value:.0f} {kind.replace('_', ' ')}" for kind, value in kinds.items() if value)
        share = sum(skipped) / len(skipped)
        found.append(Finding(WARN, f"{share:.0%} of the last steps were skipped (in all: {what})", slower))
    return found


def alarms(run: Path, metrics: Metrics) -> list[Finding]:
    """Returns what has collapsed as of the last report, in the run's own sentences with the likeliest cause and the
    setting to change. Runs of earlier versions have left only numbers."""
    said = read_alarms(run)
    last: dict[str, Any] = next((line for line in reversed(metrics) if "train/loss" in line), {})
    names = [name.removesuffix("/alarm") for name, value in last.items() if name.endswith("/alarm") and value]
    cure = "the log and TensorBoard's Text name the likeliest cause and the setting to change"
    return [Finding(WARN, printable(sentence)) for sentence in said.values()] + [
        Finding(WARN, f"{name} has collapsed: {last.get(f'{name}/usage_ema') or 0:.1%} of its codes are in use", cure)
        for name in names
        if name not in said
    ]


def speed(metrics: Metrics) -> list[Finding]:
    found = []
    waits = [share for _, share in _of(metrics, "data/wait_share")[-LAST:]]
    if waits and median(waits) > WAITS:
        cure = "raise data.workers, set data.decoder=turbo, or prepare smaller shards (--short-side)"
        found.append(Finding(WARN, f"{median(waits):.0%} of the time is spent waiting for data", cure))
    times = [value for _, value in _of(metrics, "perf/slowest_rank")[-LAST:]]
    if times and median(times) >= SLOW:
        what = f"one rank takes {median(times):.1f} times as long as the others"
        found.append(Finding(WARN, what, "check the node of the rank that the log names"))
    rates = [rate for _, rate in _of(metrics, "perf/images_per_second")]
    if len(rates) > 2 * LAST and median(rates[-LAST:]) < FEWER * median(rates):
        what = f"{median(rates[-LAST:]):.3g} images/s recently, usually {median(rates):.3g}"
        found.append(Finding(WARN, what, "look for another job on the node, a full disk, or a hot device"))
    return found


def _of(metrics: Metrics, name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
