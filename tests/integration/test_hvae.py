"""Hierarchical VAEs under real DeepSpeed: one loss curve at every stage and number of ranks, and exact resume."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Start, finish, ranks
from tests.integration.conftest import forked, losses, training, written
from tests.integration.test_resume import kill_at, rewind_all, same_bits, went_on_to_the_same_bits

HERE = Path(__file__).parent
LEVELS = {"vdvae": 5, "hvae": 2}


class Case(NamedTuple):
    model: str
    world: int = 1
    precision: str = "fp32"
    zero_stage: int = 0
    accumulation: int = 1
    checkpointing: bool = False

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in self)


CASES = [
    Case("vdvae"),
    Case("vdvae", zero_stage=1, accumulation=3),
    *(Case("vdvae", 2, zero_stage=zero) for zero in (0, 1, 2)),
    Case("vdvae", 2, checkpointing=True),
    Case("vdvae", 2, "bf16"),
    Case("vdvae", 2, "fp16", 1),
    Case("hvae"),
    Case("hvae", 2, zero_stage=2),
]
# test_resume.py has all precisions and stages.
RESUMED = [Case("vdvae", zero_stage=1, accumulation=3), Case("vdvae", 2, "fp16", 1), CASES[-1]]


def train(folder: Path, pictures: Path, cases: list[Case]) -> None:
    jobs = []
    for case in cases:
        out = folder / case.name
        values = {"run": out / "run", "data.root": pictures, **case._asdict()}
        del values["model"], values["world"]
        checkpointing = values.pop("checkpointing")
        if checkpointing:
            values["model.checkpointing"] = "true"
        jobs.append(training(out, HERE / f"tiny_{case.model}.yaml", written(values), case.world))
    forked(folder, jobs)


@pytest.fixture(scope="module")
def trained(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hvae")
    train(folder, pictures, CASES)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_loss_curve_at_every_stage_and_world_size(trained: Path, case: Case) -> None:
    """The first steps of fp16 only find the loss scale, so that its test only requires a falling loss."""
    curve, alone = (losses(trained / one.name / "run") for one in (case, Case(case.model)))
    if case.precision == "fp16":
        assert curve[-1] < curve[0] - 0.02
    else:
        assert curve == pytest.approx(alone, rel=1e-4 if case.precision == "fp32" else 1e-2)
    assert alone[-1] < alone[0] - 0.1


def test_a_resumed_run_ends_in_the_same_bits(trained: Path, pictures: Path, tmp_path: Path) -> None:
    rewind_all(trained, tmp_path, RESUMED)
    train(tmp_path, pictures, RESUMED)
    went_on_to_the_same_bits(trained, tmp_path, RESUMED)


def test_killed_in_mid_run(trained: Path, pictures: Path, tmp_path: Path, start: Start) -> None:
    command = ["launch/train.py", "--config", str(HERE / "tiny_vdvae.yaml"), f"run={tmp_path}", f"data.root={pictures}"]
    kill_at(ranks(start, 1, command), 6)
    assert not (tmp_path / "checkpoints" / "step-00000012").exists()
    (process,) = ranks(start, 1, command)
    code, output = finish(process)
    assert code == 0, output
    same_bits(tmp_path, trained / Case("vdvae").name / "run")


@pytest.mark.parametrize("model", LEVELS)
def test_what_there_is_to_see(trained: Path, start: Start, model: str) -> None:
    """The per-level rates sum to the rate, TensorBoard has the pictures, and the usual commands evaluate and sample."""
    run, levels = trained / Case(model).name / "run", range(LEVELS[model])
    board = EventAccumulator(str(run / "tensorboard")).Reload()
    pictures = {"Val/Reconstructions", "Val/Samples", "Val/progressive", "Val/rates"}
    assert pictures <= set(board.Tags()["images"])
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert sum(last[f"val/rate/level{level}"] for level in levels) == pytest.approx(last["val/rate"])
    assert last["val/rate"] + last["val/distortion"] == pytest.approx(last["val/bits_per_dim"])
    assert sum(last[f"val/active_units/level{level}"] for level in levels) == last["val/active_units"]
    assert all(0 < last[f"posterior_scale/level{level}"] < 2 for level in levels)

    code, output = finish(start([sys.executable, "launch/evaluate.py", "--run", str(run), "--iw", "3"]))
    assert code == 0, output
    assert f"rate (bits/dim), level{levels[-1]}" in output
    assert "active units, share" in output
    code, output = finish(start([sys.executable, "launch/sample.py", "--run", str(run), "--count", "8"]))
    assert code == 0, output
    names = {path.stem.removeprefix("sample_") for path in run.glob("sample_*.png")}
    expected = {"generate", "interpolate", "interpolate_levels", "vary", "traverse"}
    assert names == expected | ({"swap_classes"} if model == "vdvae" else set())
