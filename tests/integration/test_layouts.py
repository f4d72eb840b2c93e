"""Weights in channels_last, against contiguous ones, on two ranks. The strict group refuses collectives of tensors that
are not contiguous."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import ROOT
from tests.integration.conftest import STEPS, forked, losses, training, written

FAMILIES = {"tiny": "{}", "tiny_vae": "{}", "deepspeed": "{prescale_gradients: false}"}  # → who averages gradients


@pytest.fixture(scope="module")
def layouts(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("layouts")
    jobs = []
    for name, passed in FAMILIES.items():
        for channels_last in ("false", "true"):
            out = folder / f"{name}-{channels_last}"
            config = ROOT / "tests" / "integration" / f"{'tiny' if name == 'deepspeed' else name}.yaml"
            values = {"run": out / "run", "data.root": pictures, "channels_last": channels_last, "deepspeed": passed}
            jobs.append(training(out, config, written(values), world=2))
    forked(folder, jobs)
    return folder


@pytest.mark.parametrize("name", FAMILIES)
def test_two_ranks_train_alike_in_both_layouts(layouts: Path, name: str) -> None:
    one, other = (layouts / f"{name}-{channels_last}" for channels_last in ("false", "true"))
    assert len(losses(one / "run")) == STEPS
    assert losses(one / "run") == pytest.approx(losses(other / "run"), rel=1e-5)
    files = ["rank-0.safetensors", "rank-1.safetensors"]
    files += [f"run/checkpoints/step-{STEPS:08d}/{file}.safetensors" for file in ("model", "ema", "optimizer")]
    for file in files:
        mine, theirs = load_file(one / file), load_file(other / file)
        assert mine.keys() == theirs.keys()
        for key, value in mine.items():
            torch.testing.assert_close(value, theirs[key], rtol=1e-5, atol=1e-5, msg=f"{file}: {key}")
