"""The perceptual distance as a metric: of validations, and of any run by launch/evaluate.py."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from launch import evaluate as measure
from tests.conftest import Command
from tests.evaluation.test_metrics import Halves
from tests.test_library import untrained
from vaescale import settings, trained
from vaescale.config import ConfigError
from vaescale.data import stream
from vaescale.evaluation import tables
from vaescale.evaluation.evaluate import evaluate
from vaescale.nn.perceptual import KINDS, drawn


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "random.safetensors"
    save_file(drawn("perceptual_random").tensors, path, {"kind": "perceptual_random", "source": "drawn"})
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_the_mean_over_images_under_its_own_name(kind: str, pictures: Path) -> None:
    slices = stream.ValidationSlices(stream.Config(root=str(pictures), size=32, workers=0))
    distance = drawn(kind)
    codec = Wide()
    results = [evaluate(codec, slices, torch.device("cpu"), micro, distance=distance) for micro in (4, 100)]
    batch = slices[range(11)].batch
    y = (codec.decode(codec.encode(batch)).clamp(0, 1) * 255).round() / 255
    expected = float(distance(y, batch.x / 255).mean())
    for result in results:
        assert result[kind] == pytest.approx(expected, rel=1e-4)
        assert {*KINDS} & result.keys() == {kind}
        assert f"{KINDS[kind].words} {result[kind]:.4f}" in tables.line(result)
    assert not {*KINDS} & evaluate(codec, slices, torch.device("cpu")).keys()


class Wide(Halves):
    def decode(self, latents: list[torch.Tensor], label: object = None, temperature: float = 1.0) -> torch.Tensor:
        return super().decode(latents)[..., :1, :1].expand(-1, -1, 32, 32)


def test_any_run_can_be_measured_with_a_given_file(
    pictures: Path, tmp_path: Path, file: Path, command: Command
) -> None:
    run = untrained(tmp_path, "tiny", pictures)
    code, output = command(measure, "--run", run, "data.workers=0", "--perceptual", file)
    assert (code, "perceptual distance (random trunk)" in output) == (0, True)
    result = json.loads((run / "evaluation.json").read_text())
    assert result["perceptual_random"] > 0
    assert result["perceptual"]["source"] == "drawn"
    code, output = command(measure, "--run", run, "--perceptual", tmp_path / "none")
    assert (code, "none cannot be read" in output) == (2, True)


def test_a_run_is_measured_with_its_own_distance_and_used_without(
    pictures: Path, tmp_path: Path, file: Path, command: Command
) -> None:
    own = ["model.reconstruction.perceptual.weight=0.5", f"model.reconstruction.perceptual.weights={file}"]
    run = untrained(tmp_path, "tiny", pictures, *own)
    assert command(measure, "--run", run, "data.workers=0")[0] == 0
    assert json.loads((run / "evaluation.json").read_text())["perceptual_random"] > 0

    file.unlink()
    (run / "evaluation.json").unlink()  # whose number would be kept
    code, output = command(measure, "--run", run)
    assert code == 0
    assert "the perceptual distance is not measured: " in output
    assert "cannot be read (it does not exist)" in output
    assert "perceptual_random" not in json.loads((run / "evaluation.json").read_text())
    config = trained.read_config(run, [])
    with pytest.raises(ConfigError, match="cannot be read"):  # to train on needs the file
        settings.check(config, 1)
    assert trained.read_model(run, config, torch.device("cpu"))[1] == 2
