"""Training with a perceptual distance: the command a user gives first, its error, and what the run reports."""

import json
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tests.conftest import Start, finish, free_port, ranks
from vaescale.nn.perceptual import drawn

KEY = "model.reconstruction.perceptual"
TINY = Path("tests/integration/tiny.yaml")


def train(pictures: Path, run: Path, start: Start, *given: str, world: int = 1) -> tuple[int, str]:
    command = ["launch/train.py", "--config", str(TINY), f"run={run}", f"data.root={pictures}", *given]
    results = [finish(process) for process in ranks(start, world, command)]
    return max(code for code, _ in results), "".join(output for _, output in results)


@pytest.mark.parametrize("world", [1, 2])
def test_without_weights_the_user_is_told_what_to_fetch(
    world: int, pictures: Path, tmp_path: Path, start: Start
) -> None:
    code, output = train(pictures, tmp_path / "run", start, f"{KEY}.weight=1", world=world)
    assert code == 2
    assert output.count("error: ") == 1
    assert f"{KEY}.weights is not set: fetch vgg16-397923af.pth" in output
    assert "BSD-3-Clause" in output
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_weights_that_one_rank_lacks_are_named_by_that_rank(pictures: Path, tmp_path: Path, start: Start) -> None:
    """As on a node without the file: rank 0 has found nothing wrong, and yet both ranks end."""
    homes = [tmp_path / "home0", tmp_path / "home1"]
    for home in homes:
        home.mkdir()
    save_file(drawn("perceptual_random").tensors, homes[0] / "random", {"kind": "perceptual_random"})
    command = [sys.executable, "launch/train.py", "--config", str(TINY), f"run={tmp_path / 'run'}"]
    command += [f"data.root={pictures}", f"{KEY}.weight=1", f"{KEY}.weights=~/random"]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    processes = [
        start(command, RANK=str(rank), LOCAL_RANK=str(rank), HOME=str(home), **shared)
        for rank, home in enumerate(homes)
    ]
    (first, told), (second, output) = (finish(process) for process in processes)
    assert (first, second) == (2, 2)
    assert "error: rank 0: another rank cannot read a file, see its error" in told
    assert f"error: rank 1: {homes[1] / 'random'} cannot be read (it does not exist)" in output


def test_a_run_trains_validates_and_resumes_with_it(pictures: Path, tmp_path: Path, start: Start) -> None:
    """At ZeRO 1 on two ranks. A run that was cut in two ends with the same bits, and checkpoints have no trunk."""
    file = tmp_path / "random.safetensors"
    save_file(drawn("perceptual_random").tensors, file, {"kind": "perceptual_random"})
    given = [f"{KEY}.weight=1", f"{KEY}.weights={file}", "model.reconstruction.l1=2", "zero_stage=1"]
    ends = []
    for name, parts in {"whole": [12], "cut": [4, 12]}.items():
        for steps in parts:
            code, output = train(
                pictures, tmp_path / name, start, *given, f"steps={steps}", "optimizer.final_lr_ratio=1", world=2
            )
            assert code == 0, output
        ends.append(load_file(tmp_path / name / "checkpoints" / "step-00000012" / "model.safetensors"))
    assert ends[0].keys() == ends[1].keys()
    assert all((ends[0][name] == ends[1][name]).all() for name in ends[0])
    assert not any("trunk" in name or "head" in name for name in ends[0])
    lines = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    reported = [line for line in lines if "train/perceptual_random" in line]
    assert len(reported) == 12
    for line in reported:
        expected = 2 * line["train/l1"] + line["train/perceptual_random"] + 0.25 * line["codebook/commitment"]
        assert line["train/loss"] == pytest.approx(expected, rel=1e-4)
    assert any(line.get("val/perceptual_random", 0) > 0 for line in lines)
