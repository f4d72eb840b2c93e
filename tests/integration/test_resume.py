"""A run that stopped and was resumed ends with the same bits as one that never stopped (its twin among CASES)."""

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Start, finish, ranks
from tests.integration.conftest import BATCH, STEPS, TINY, Case, forked, losses, overrides, train, training

TRAIN = ["launch/train.py", "--config", "tests/integration/tiny.yaml"]
RESUMED = [
    Case(2, "bf16", 1),
    Case(2, "fp16", 0),
    Case(2, "fp16", 1),
    Case(2, zero=1, accumulation=3),
    Case(2, zero=2, learning="gradient", accumulation=2),
]

OTHERS = {  # saved by … → resumed by …
    Case(2, zero=1, accumulation=3): Case(1),
    Case(1, accumulation=3): Case(2, "fp16", 0, accumulation=2),
    Case(2, "fp16", 0): Case(2, "fp16", 1, accumulation=2),
}


@pytest.mark.parametrize(("case", "step"), [(Case(1), 7), (Case(2), 2), (Case(2, zero=2), 10)], ids=str)
def test_killed_anywhere(trained: Path, pictures: Path, tmp_path: Path, start: Start, case: Case, step: int) -> None:
    """SIGKILL all ranks once `step` is reported (2 is before the first checkpoint), then run the same command again."""
    command = [*TRAIN, *overrides(case, tmp_path, pictures)]
    kill_at(ranks(start, case.world, command), step)
    assert not (tmp_path / "checkpoints" / f"step-{STEPS:08d}").exists()
    for process in ranks(start, case.world, command):
        code, output = finish(process)
        assert code == 0, output
    same_bits(tmp_path, trained / case.name / "run")


@pytest.fixture(scope="module")
def resumed(trained: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case of RESUMED resumed from the checkpoint of its twin at step 8, and the cases of OTHERS resumed with
    other settings."""
    folder = tmp_path_factory.mktemp("resumed")
    for case in RESUMED:
        rewind(trained / case.name / "run", folder / case.name / "run")
    for case, other in OTHERS.items():
        rewind(trained / case.name / "run", folder / other.name / "run")
    train(folder, [*RESUMED, *OTHERS.values()], pictures)
    return folder


@pytest.mark.parametrize("case", RESUMED, ids=str)
def test_every_precision_and_stage_resumes_to_the_same_bits(trained: Path, resumed: Path, case: Case) -> None:
    seen = json.loads((resumed / case.name / "rank-0.json").read_text())
    assert len(seen) == 4 * 12 // case.world  # four steps were trained, not twelve
    same_bits(resumed / case.name / "run", trained / case.name / "run")


@pytest.mark.parametrize(("case", "other"), OTHERS.items(), ids=str)
def test_another_world_stage_or_precision_may_resume(trained: Path, resumed: Path, case: Case, other: Case) -> None:
    """The loss curve is the same as without the change, up to the rounding of the precision."""
    found, twin = losses(resumed / other.name / "run"), losses(trained / case.name / "run")
    assert len(found) == STEPS
    assert found == pytest.approx(twin, rel=1e-4 if other.precision == "fp32" else 2e-2)


WORLDS = {4: 4, 8: 2, 10: 1, STEPS: 4}  # step → number of ranks that train up to it


def test_the_world_may_change_time_and_again(trained: Path, pictures: Path, tmp_path: Path) -> None:
    """4 → 2 → 1 → 4 ranks: each attempt loads exactly what was saved, no sample is repeated or left out, and the losses
    are those of 4 ranks throughout."""
    run = tmp_path / "run"
    jobs = []
    for step, world in WORLDS.items():
        given = [*overrides(Case(world, accumulation=3), run, pictures), "keep_last=9", "every.checkpoint=100"]
        asked = step - (world > 1)  # several ranks stop one step after a rank has seen the file
        fault = [] if step == STEPS else [["touch", 0, asked, str(run / "STOP")]]
        jobs.append({**training(tmp_path / str(step), TINY, given, world), "faults": fault})
    forked(tmp_path, jobs)

    each_continued_the_last(tmp_path, WORLDS, ("model", "ema", "optimizer"))
    twin = trained / Case(4, accumulation=3).name / "run"
    assert losses(run) == pytest.approx(losses(twin), rel=1e-5)


def each_continued_the_last(folder: Path, worlds: Mapping[int, int], names: Sequence[str]) -> None:
    """Each attempt, in folder/STEP, loaded exactly the files `names` that the one before had saved, and read the next
    samples. worlds: step → number of ranks that trained up to it."""
    before = 0
    for step, world in worlds.items():
        out = folder / str(step)
        ranks = [np.array(json.loads((out / f"rank-{rank}.json").read_text())) for rank in range(world)]
        seen = np.stack([part.reshape(step - before, -1) for part in ranks], axis=1)
        assert seen.flatten().tolist() == list(range(before * BATCH, step * BATCH))
        for name in names if before else ():
            taken = load_file(out / f"taken-{name}.safetensors")
            saved = load_file(folder / "run" / "checkpoints" / f"step-{before:08d}" / f"{name}.safetensors")
            assert taken.keys() == saved.keys()
            assert all(torch.equal(taken[key], saved[key]) for key in saved), name
        before = step


def test_a_finished_run_is_left_as_it_is(trained: Path, pictures: Path, tmp_path: Path, start: Start) -> None:
    shutil.copytree(trained / Case(1).name / "run", tmp_path / "run")
    (process,) = ranks(start, 1, [*TRAIN, *overrides(Case(1), tmp_path / "run", pictures)])
    code, output = finish(process)
    assert code == 0, output
    assert "resumes at step 12" in output
    same_bits(tmp_path / "run", trained / Case(1).name / "run")


def test_another_order_of_samples_is_refused(trained: Path, pictures: Path, tmp_path: Path, start: Start) -> None:
    shutil.copytree(trained / Case(1).name / "run", tmp_path / "run")
    (process,) = ranks(start, 1, [*TRAIN, *overrides(Case(1), tmp_path / "run", pictures), "seed=1"])
    code, output = finish(process)
    assert code == 2
    assert "was started with seed=0 and now has 1" in output


def kill_at(processes: Sequence[subprocess.Popen[str]], step: int) -> None:
    assert processes[0].stdout is not None
    lines = []
    for line in processes[0].stdout:
        lines.append(line)
        if line.startswith(f"step {step:>2}/"):
            break
    else:
        pytest.fail(f"step {step} was never reported: {''.join(lines)}")
    for process in processes:
        os.killpg(process.pid, signal.SIGKILL)
    for process in processes:
        process.communicate()
        assert process.returncode == -signal.SIGKILL


def rewind(run: Path, copy: Path) -> None:
    """Copy the run and make its checkpoint of step 8 the newest."""
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / f"step-{STEPS:08d}")
    (copy / "checkpoints" / "latest").write_text("step-00000008\n")


def rewind_all(trained: Path, folder: Path, cases: Sequence[Any]) -> None:
    """Copy and rewind the run of each case from `trained` to `folder`. A case has a name and a world."""
    for case in cases:
        (folder / case.name).mkdir()
        rewind(trained / case.name / "run", folder / case.name / "run")


def went_on_to_the_same_bits(trained: Path, folder: Path, cases: Sequence[Any]) -> None:
    """Each case has trained the four missing steps, not twelve, and its run has the same bits."""
    for case in cases:
        assert len(json.loads((folder / case.name / "rank-0.json").read_text())) == 4 * 12 // case.world
        same_bits(folder / case.name / "run", trained / case.name / "run")


def same_bits(run: Path, twin: Path, steps: int = STEPS) -> None:
    newest = f"checkpoints/step-{steps:08d}"
    for name in ("model", "ema", "optimizer"):
        file = f"{newest}/{name}.safetensors"
        assert (run / file).read_bytes() == (twin / file).read_bytes(), name
    states = [json.loads((path / newest / "state.json").read_text()) for path in (run, twin)]
    assert states[0] == states[1]
    assert losses(run) == losses(twin)
