"""The cases that are trained on forked ranks, once for all tests of this folder."""

import json
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.conftest import ROOT, begin

TINY = ROOT / "tests" / "integration" / "tiny.yaml"
STEPS, BATCH, SEED = 12, 12, 0  # as in tiny.yaml


class Case(NamedTuple):
    world: int
    precision: str = "fp32"
    zero: int = 0
    accumulation: int = 1
    learning: str = "ema"

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in self)


CASES = [
    Case(1),
    Case(1, learning="gradient"),
    *(Case(2, precision, zero) for precision in ("fp32", "bf16", "fp16") for zero in (0, 1, 2)),
    Case(1, "bf16"),
    Case(1, "fp16"),
    Case(1, accumulation=3),
    Case(2, zero=1, accumulation=3),
    Case(4, accumulation=3),
    Case(2, learning="gradient"),
    Case(2, zero=2, learning="gradient", accumulation=2),
]


def overrides(case: Case, run: Path, pictures: Path) -> list[str]:
    values = {
        "run": run,
        "data.root": pictures,
        "precision": case.precision,
        "zero_stage": case.zero,
        "accumulation": case.accumulation,
        "model.quantizer.learning": case.learning,
    }
    return written(values)


def written(values: Mapping[str, object]) -> list[str]:
    """Settings as command-line overrides."""
    return [f"{key}={value}" for key, value in values.items()]


def train(folder: Path, cases: list[Case], pictures: Path) -> None:
    """Train the cases one after another. Their results are in folder/NAME, their runs in folder/NAME/run."""
    forked(
        folder,
        [
            training(folder / case.name, TINY, overrides(case, folder / case.name / "run", pictures), case.world)
            for case in cases
        ],
    )


def training(out: Path, config: Path, given: Sequence[str], world: int = 1) -> dict[str, Any]:
    """A job for `forked` that trains once."""
    return {"task": "train", "world": world, "out": str(out), "config": str(config), "overrides": list(given)}


def forked(folder: Path, jobs: list[dict[str, Any]], timeout: float = 500, within: Sequence[str] = ()) -> str:
    """Run the jobs with forked.py one after another, in at most `timeout` seconds. `within` is a command that forked.py
    is run under. Returns what it printed."""
    for job in jobs:
        Path(job["out"]).mkdir(exist_ok=True)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [*within, sys.executable, "-m", "tests.integration.forked", str(folder / "jobs.json")]
    process = begin(command)
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # remaining ranks
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="session")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    train(folder, CASES, pictures)
    return folder


def losses(run: Path) -> list[float]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [value["train/loss"] for value in map(json.loads, lines) if "train/loss" in value]
