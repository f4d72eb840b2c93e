"""Weights go out and come back in, and an imported run does what a run of one's own does."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from launch import evaluate, export, sample, weights
from tests.integration.conftest import TINY, forked, training, written
from vaescale import distributed
from vaescale.lifecycle import checkpoint

VQGAN, KL, PRIOR = (TINY.with_name(f"tiny_{name}.yaml") for name in ("vqgan", "kl", "prior"))
IMPORTED = [("vqgan", "diffusers"), ("vqgan", "taming"), ("kl", "diffusers")]
LEFT_OUT = {"bits_per_dim", "rate", "distortion"}  # which depend on what no other library has


def call(command: Any, *words: object) -> None:
    """Runs a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [command.__name__, *map(str, words)])
        patch.setattr(distributed, "init", lambda: torch.device("cpu"))
        assert command.main(command.parse()) == 0


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQGAN and a KL autoencoder that were trained here, in own, exported to each library and imported from it."""
    folder = tmp_path_factory.mktemp("runs")
    given = {"data.root": pictures, "steps": 6}
    jobs = [
        training(folder / f"{kind}-own", file, written({**given, "run": folder / f"{kind}-own" / "run"}))
        for kind, file in (("vqgan", VQGAN), ("kl", KL))
    ]
    forked(folder, jobs)
    for kind, library in IMPORTED:
        out = folder / f"{kind}-{library}"
        out.mkdir()
        source = out / ("theirs" if library == "diffusers" else "theirs.safetensors")
        call(export, library, folder / f"{kind}-own" / "run", source)
        words = ["--run", out / "run", "--data", pictures, "data.size=16", "data.workers=0", "data.columns=8"]
        call(weights, "import", library, source, *words)
    return folder


@pytest.mark.parametrize(("kind", "library"), IMPORTED)
def test_numbers_of_a_round_trip_are_equal(runs: Path, kind: str, library: str) -> None:
    own, again = runs / f"{kind}-own" / "run", runs / f"{kind}-{library}" / "run"
    call(evaluate, "--run", own, again, "data.workers=0")
    before, after = (json.loads((run / "evaluation.json").read_text()) for run in (own, again))
    assert (before["images"], after["images"]) == (11, 11)
    numbers = {name for name, value in after.items() if isinstance(value, float)}
    assert numbers >= ({"psnr", "ssim", "usage", "perplexity"} if kind == "vqgan" else {"psnr", "ssim"})
    for name in numbers - LEFT_OUT:
        assert after[name] == pytest.approx(before[name], rel=1e-9), name


def test_latent_statistics_come_back(runs: Path) -> None:
    """Up to the rounding of latents_std."""
    before, after = (load_file(newest(runs / f"kl-{one}" / "run") / "ema.safetensors") for one in ("own", "diffusers"))
    for name in ("latent_mean", "latent_std"):
        assert before[name].isfinite().all()
        torch.testing.assert_close(before[name], after[name], rtol=1e-6, atol=1e-7)


def test_an_imported_run_is_a_tokenizer_and_a_start(runs: Path, pictures: Path, tmp_path: Path) -> None:
    """Of a prior, of a training of its decoder and of one of all; and it exports its codes."""
    tokenizer = runs / "vqgan-diffusers" / "run"
    call(export, "codes", "--run", tokenizer, "--out", tmp_path / "codes", "data.workers=0")
    given = {"steps": 2, "model.tokenizer": tokenizer, "data.root": tmp_path / "codes", "model.classes": 0}
    jobs = [training(tmp_path / "prior", PRIOR, written({**given, "run": tmp_path / "prior" / "run"}))]
    given = {"steps": 2, "init_from": tokenizer, "data.root": pictures, "global_batch": 12, "precision": "fp32"}
    for train in ("decoder", "all"):
        more = {"run": tmp_path / train / "run", "train": train, "optimizer.lr": 1e-3}
        jobs.append(training(tmp_path / train, tokenizer / "config.yaml", written({**given, **more})))
    forked(tmp_path, jobs)
    before, decoder, whole = (
        load_file(newest(run) / "ema.safetensors")
        for run in (tokenizer, tmp_path / "decoder" / "run", tmp_path / "all" / "run")
    )
    for name in ("quantizer.codebook", "encoder.first.weight"):
        assert torch.equal(before[name], decoder[name])
        moved = (whole[name] - before[name]).abs().max()
        assert 0 < moved <= 2e-3  # at most lr in each step: no code was initialised or reset
    assert not torch.equal(before["decoder.first.weight"], decoder["decoder.first.weight"])
    assert decoder["error_std"].isfinite().all()


def newest(run: Path) -> Path:
    found = checkpoint.newest(run / "checkpoints").path
    assert found is not None
    return found


def test_latents_of_an_imported_run_are_sampled(runs: Path, tmp_path: Path) -> None:
    call(sample, "--run", runs / "kl-diffusers" / "run", "--out", tmp_path, "data.workers=0")
    assert list(tmp_path.glob("sample_*.png"))
