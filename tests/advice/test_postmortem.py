"""The diagnosis of a run directory: each fault once, and none for a healthy run."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.lifecycle.test_checkpoint import flip
from vaescale.advice import postmortem
from vaescale.advice.postmortem import Metrics
from vaescale.lifecycle import checkpoint
from vaescale.lifecycle.status import Status
from vaescale.monitoring.board import Board


def reports(count: int, **values: Any) -> Metrics:
    usual = {"train/loss": 0.5, "optim/skipped": 0.0, "perf/seconds_per_step": 0.1, "perf/images_per_second": 100.0}
    named = {name.replace("__", "/"): value for name, value in values.items()}
    return [
        {"step": 20 * (i + 1), **usual, "data/wait_share": 0.02, "perf/slowest_rank": 1.1, **named}
        for i in range(count)
    ]


def write(run: Path, metrics: Metrics) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))


def said(run: Path) -> str:
    return "\n".join(map(str, postmortem.diagnose(run)))


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    write(tmp_path, reports(60))
    Status(tmp_path, 0).begin(0)
    checkpoint.save(tmp_path / "checkpoints", 1000, {"model": {"w": torch.ones(3)}}, {"step": 1000}, 2)
    return tmp_path


def test_a_healthy_run_has_no_faults(healthy: Path) -> None:
    assert [finding.level for finding in postmortem.diagnose(healthy)] == ["ok", "ok"]
    assert "ok: running at step 1200, the last report 0 s ago, usually one every 2 s" in said(healthy)
    for status in ("finished", "preempted"):
        Status(healthy, 0).end(status, "SIGTERM", 1200)
        assert [finding.level for finding in postmortem.diagnose(healthy)] == ["ok", "ok"]


def test_a_running_status_without_new_reports_is_a_failure(healthy: Path) -> None:
    long_ago = time.time() - 1000
    os.utime(healthy / "metrics.jsonl", (long_ago, long_ago))
    assert "FAIL: running at step 1200, the last report 1000 s ago" in said(healthy)


def test_a_run_that_failed_says_why_and_how_often(healthy: Path) -> None:
    for attempt, words in enumerate(["on rank 3: full", "on rank 3, 2 times in a row: full", "fail in the same way"]):
        Status(healthy, 0).begin(7)
        Status(healthy, 3).fail("full", 8)
        assert "FAIL: failed at step 8 on rank 3" in said(healthy), attempt
        assert words in said(healthy)


def test_a_missing_run_is_a_failure(tmp_path: Path) -> None:
    assert "FAIL: " in said(tmp_path / "none")


def test_damaged_checkpoints(healthy: Path) -> None:
    checkpoint.save(healthy / "checkpoints", 1100, {"model": {"w": torch.ones(3)}}, {"step": 1100}, 2)
    flip(healthy / "checkpoints" / "step-00001100" / "model.safetensors", -1)
    assert "warn: step-00001100 is damaged (model.safetensors has changed" in said(healthy)
    assert "ok: the same command continues from step-00001000" in said(healthy)
    flip(healthy / "checkpoints" / "step-00001000" / "model.safetensors", -1)
    assert "FAIL: none of the 2 checkpoint(s)" in said(healthy)


ILLS: dict[str, tuple[Metrics, str]] = {
    "not finite": (reports(1, train__loss=None), "FAIL: the loss is not finite at step 20: lower optimizer.lr"),
    "diverges": (
        reports(40) + reports(30, train__loss=0.9),
        "the loss diverges: it is 0.9 now and was 0.5 at its best",
    ),
    "skips": (
        reports(20, optim__skipped=0.2, **{"optim/skipped_not_finite": 80.0, "optim/skipped_spike": 0.0}),
        "warn: 20% of the last steps were skipped (in all: 80 not finite)",
    ),
    "collapse": (
        reports(3, codebook1__alarm=1.0, codebook1__usage_ema=0.031, codebook0__alarm=0.0),
        "warn: codebook1 has collapsed: 3.1% of its codes are in use",
    ),
    "waits": (reports(20, data__wait_share=0.4), "warn: 40% of the time is spent waiting for data"),
    "slow rank": (reports(20, perf__slowest_rank=2.4), "warn: one rank takes 2.4 times as long as the others"),
    "slower": (
        reports(60) + reports(25, perf__images_per_second=40.0),
        "warn: 40 images/s recently, usually 100",
    ),
}


@pytest.mark.parametrize("ill", ILLS)
def test_faults_are_found_in_the_metrics(healthy: Path, ill: str) -> None:
    metrics, words = ILLS[ill]
    write(healthy, metrics)
    assert words in said(healthy)
    assert sum(finding.level != "ok" for finding in postmortem.diagnose(healthy)) == 1


def test_an_alarm_is_repeated_as_the_run_said_it(healthy: Path) -> None:
    """The alarm is repeated until it is over, and also if the run was resumed from a step before it."""
    write(healthy, reports(3, codebook__alarm=1.0, latents__alarm=1.0))
    board = Board(healthy, 60)
    board.alarm("codebook", "codebook has collapsed at step 60: so. Because: set this", True, 60)
    board.alarm("latents", "latents have collapsed at step 60: \x1b[31m", True, 60)
    warnings = [line for line in said(healthy).splitlines() if line.startswith("warn")]
    assert warnings == [
        "warn: codebook has collapsed at step 60: so. Because: set this",
        "warn: latents have collapsed at step 60: \\x1b[31m",
    ]
    board.alarm("codebook", "codebook has recovered", False, 60)
    board.close()
    write(healthy, reports(3, codebook__alarm=0.0, latents__alarm=1.0))
    assert "codebook" not in said(healthy)
    Board(healthy, 40).close()
    write(healthy, reports(2))
    assert "collapsed" not in said(healthy)
    for damage in ("", "[1]", '{"latents": 3}'):
        (healthy / "alarms.json").write_text(damage)
        assert "collapsed" not in said(healthy)


def test_damaged_files_do_not_stop_the_doctor(healthy: Path) -> None:
    """Damaged files of any content do not stop the doctor; of stacks, it shows what can be read."""
    with (healthy / "metrics.jsonl").open("ab") as file:
        file.write(
            b'\0\0{"step": 1}\n\xff\n{"step": 1, "train/loss": "x", "perf/seconds_per_step": []}\n{"train/loss": 1}\n'
        )
    stacks = healthy / "stacks"
    stacks.mkdir()
    (stacks / "rank-0.txt").write_bytes(b"\xff\x1b[31m half a head")
    (stacks / "rank-1.txt").mkdir()
    assert "it hung: \N{REPLACEMENT CHARACTER}\\x1b[31m half a head" in said(healthy)
    (healthy / "run_status.json").write_text('{"status": "failed", "failures": 3}')
    assert "no run_status.json" in said(healthy)


def test_a_truncated_line_is_skipped(healthy: Path) -> None:
    with (healthy / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1220, "train/lo')
    assert "running at step 1200" in said(healthy)
