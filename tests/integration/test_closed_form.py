"""PCA on real ranks through the commands that a user types."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import Start, finish, ranks
from tests.models.test_pca import equal
from vaescale.data import stream
from vaescale.interfaces import Shape
from vaescale.models.pca import PCA, Config

SETTINGS = ["data.channels=3", "data.workers=0", "model.latent_dim=8", "every.validate=3", "every.checkpoint=3"]


def command(run: Path, pictures: Path, *overrides: str) -> list[str]:
    config = ["launch/train.py", "--config", "configs/pca_digits.yaml"]
    return [*config, f"run={run}", f"data.root={pictures}", "global_batch=12", *SETTINGS, *overrides]


@pytest.fixture(scope="module")
def rows(pictures: Path) -> torch.Tensor:
    """The training images without augmentation, fp64 [90, 768] in [0, 1]."""
    config = stream.Config(str(pictures), 16, augment=False, workers=0)
    x = stream.TrainSlices(config, seed=0)[range(90)].batch.x
    return x.flatten(1).double() / 255


def learned(run: Path, step: int = 8, patch: int = 0) -> PCA:
    model = PCA(Config(latent_dim=8, patch=patch), Shape(3, 16))
    model.load_state_dict(load_file(run / "checkpoints" / f"step-{step:08d}" / "model.safetensors"))
    return model


def test_it_learns_scikit_learns_components(pictures: Path, rows: torch.Tensor, tmp_path: Path, start: Start) -> None:
    """90 images are eight batches of 12, of which the last has six images of the next epoch. The result is
    bit-identical on one rank, on two, and on one that resumes a run of two with another batch size."""
    one, two = tmp_path / "one", tmp_path / "two"
    processes = [start([sys.executable, *command(one, pictures)]), *ranks(start, 2, command(two, pictures))]
    outputs = []
    for process in processes:
        code, output = finish(process)
        assert code == 0, output
        outputs.append(output)
    assert all("step 8/8" in output for output in outputs[:2])
    equal(learned(one), rows.numpy())
    resumed = tmp_path / "resumed"
    shutil.copytree(two, resumed)
    shutil.rmtree(resumed / "checkpoints" / "step-00000008")
    (resumed / "checkpoints" / "latest").write_text("step-00000006\n")
    code, output = finish(start([sys.executable, *command(resumed, pictures, "global_batch=7")]))
    assert code == 0, output
    assert "resumes at step 6" in output
    model = (one / "checkpoints/step-00000008/model.safetensors").read_bytes()
    assert (two / "checkpoints/step-00000008/model.safetensors").read_bytes() == model
    assert (resumed / "checkpoints/step-00000009/model.safetensors").read_bytes() == model  # 18 images, 7 at a time


def test_patches_are_learned_on_two_ranks(pictures: Path, rows: torch.Tensor, tmp_path: Path, start: Start) -> None:
    processes = ranks(start, 2, command(tmp_path, pictures, "model.patch=4"))
    for process in processes:
        code, output = finish(process)
        assert code == 0, output
    patches = rows.view(90, 3, 4, 4, 4, 4).permute(0, 2, 4, 1, 3, 5).reshape(-1, 48)
    equal(learned(tmp_path, patch=4), patches.numpy())
    assert "\nsteps: 8\n" in (tmp_path / "config.yaml").read_text()
    names = set().union(*map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines()))
    assert {"train/psnr", "train/explained", "val/psnr"} <= names
    code, output = finish(start([sys.executable, "launch/evaluate.py", "--run", str(tmp_path)]))
    assert code == 0, output
    assert "at step 8" in output
