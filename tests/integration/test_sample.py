"""Sampling with the commands that a user types, from the cheapest model that has a prior."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.conftest import Start, finish, ranks
from tests.integration.test_closed_form import command

MODES = ["generate", "interpolate", "traverse", "vary"]  # a PCA has no condition to swap


@pytest.fixture
def run(pictures: Path, tmp_path: Path, start: Start) -> Path:
    (process,) = ranks(start, 1, command(tmp_path / "run", pictures))
    code, output = finish(process)
    assert code == 0, output
    return tmp_path / "run"


def files(run: Path) -> dict[str, bytes]:
    return {path.stem.removeprefix("sample_"): path.read_bytes() for path in run.glob("sample_*.png")}


def test_the_same_command_gives_the_same_pictures(run: Path, start: Start) -> None:
    """All modes that the model supports. Another seed, temperature or image changes the pictures that depend on it."""
    sample = [sys.executable, "launch/sample.py", "--run", str(run), "--count", "10"]
    before = (run / "metrics.jsonl").read_bytes()
    made = []
    for arguments in (
        ["--board"],
        ["--seed", "0"],
        ["generate", "--seed", "1"],
        ["generate", "vary", "--images", "3", "--temperature", "0", "1", "data.cache_gib=1"],
    ):
        code, output = finish(start([*sample, *arguments]))
        assert code == 0, output
        assert ("skipped swap: the model has neither class" in output) == (not {"generate"} & set(arguments))
        made.append(files(run))
    assert sorted(made[0]) == MODES
    assert made[0] == made[1]
    assert [name for name in MODES if made[2][name] != made[1][name]] == ["generate"]
    assert [name for name in MODES if made[3][name] != made[2][name]] == ["generate", "vary"]
    with Image.open(run / "sample_generate.png") as picture:
        coldest = np.asarray(picture)[18 : 18 + 96, 4 : 4 + 4 * 100]
        images = [coldest[:, left : left + 96] for left in range(0, 400, 100)]
        assert all(np.array_equal(images[0], image) for image in images)  # at temperature 0 all are the mean image

    board = EventAccumulator(str(run / "tensorboard" / "samples")).Reload()
    assert board.Tags()["images"] == ["generate", "interpolate", "vary", "traverse"]
    assert [event.step for event in board.Images("generate")] == [8]
    assert (run / "metrics.jsonl").read_bytes() == before
    training = EventAccumulator(str(run / "tensorboard")).Reload()
    assert [event.step for event in training.Images("Val/Samples")] == [3, 6, 8]
