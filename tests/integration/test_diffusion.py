"""Diffusions, trained by the real learner and engine: over pixels and over latents, resumed, killed, on several ranks,
and measured."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from launch import evaluate, sample
from tests.conftest import ROOT
from tests.faults.test_checkpoints import POINTS, End, end, job
from tests.integration.conftest import forked, losses, training, written
from tests.integration.test_prior import called, values
from tests.integration.test_resume import rewind, same_bits
from tests.lifecycle.test_checkpoint import forge
from tests.test_library import untrained
from vaescale import trained
from vaescale.config import ConfigError
from vaescale.data import stream

CONFIG = ROOT / "tests" / "integration" / "tiny_diffusion.yaml"
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "kl": ("tiny_kl.yaml", {}),
    "vae": ("tiny_vae.yaml", {}),
    "hvae": ("tiny_hvae.yaml", {"model.posterior": "top-down", "data.channels": 3}),
}
LATENTS: dict[str, Any] = {"model.over": "kl", "model.patch": 2}
CASES: dict[str, tuple[int, dict[str, Any]]] = {  # name → ranks, settings
    "pixels": (1, {}),
    "two": (2, {}),
    "zero1": (2, {"zero_stage": 1}),
    "zero2": (2, {"zero_stage": 2, "accumulation": 2}),
    "bf16": (1, {"precision": "bf16"}),
    "ends": (1, {"model.timesteps": 5, "model.learned_ends": True}),
    "ends_two": (2, {"model.timesteps": 5, "model.learned_ends": True}),
    "unet": (1, {"model.net": "unet", "model.width": 32}),
    "unet_two": (2, {"model.net": "unet", "model.width": 32}),
    "latents": (1, LATENTS),
    "latents_two": (2, LATENTS),
    "flow": (1, {**LATENTS, "model.weighting": "flow"}),
    "flow_two": (2, {**LATENTS, "model.weighting": "flow"}),
    "fixed": (1, {**LATENTS, "model.encoder_noise": 5}),
    "vectors": (1, {"model.over": "vae", "model.patch": 1, "data.channels": 1}),
    "coarsest": (1, {"model.over": "hvae", "model.patch": 1}),
}
RESUMED = ("pixels", "two", "zero1", "zero2", "ends", "latents", "flow")
KILLED = ("latents", "zero1")  # while the checkpoint of step 8 is written
BITS = "val/bits_per_dim"


def settings_of(folder: Path, pictures: Path, name: str) -> list[str]:
    given = {"run": folder / name / "run", "data.root": pictures, **CASES[name][1]}
    if "model.over" in given:
        given["model.over"] = folder / given["model.over"] / "run"
    return written(given)


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bases and the diffusions, each in NAME/run."""
    folder = tmp_path_factory.mktemp("diffusions")
    jobs = [
        training(
            folder / name,
            CONFIG.parent / config,
            written({"run": folder / name / "run", "data.root": pictures, **given}),
        )
        for name, (config, given) in BASES.items()
    ]
    jobs += [
        training(folder / name, CONFIG, settings_of(folder, pictures, name), world)
        for name, (world, _) in CASES.items()
    ]
    forked(folder, jobs)
    return folder


@pytest.fixture(scope="module")
def resumed(runs: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    jobs = []
    for name in KILLED:
        out, world = folder / f"{name} killed", CASES[name][0]
        words = ["launch/train.py", "--config", str(CONFIG), *settings_of(runs, pictures, name), f"run={out / 'run'}"]
        jobs.append(job(out, words, ["die", 0, POINTS[1], 8], world=world, killed=True))
        jobs.append(job(out / "again", words, world=world))
    for name in RESUMED:
        (folder / name).mkdir()
        rewind(runs / name / "run", folder / name / "run")
        given = [*settings_of(runs, pictures, name), f"run={folder / name / 'run'}"]
        jobs.append(training(folder / name, CONFIG, given, CASES[name][0]))
    forked(folder, jobs)
    return folder


@pytest.mark.parametrize("name", ["two", "zero1", "zero2"])
def test_any_stage_trains_alike(runs: Path, name: str) -> None:
    alike(runs, "pixels", name)


@pytest.mark.parametrize("name", ["ends", "unet", "latents", "flow"])
def test_any_number_of_ranks_trains_alike(runs: Path, name: str) -> None:
    """Times, noise and dropout are those of the samples, not of the ranks."""
    alike(runs, name, f"{name}_two")


def alike(runs: Path, name: str, other: str) -> None:
    assert losses(runs / name / "run") == pytest.approx(losses(runs / other / "run"), rel=1e-4)
    bits = [values(runs / each / "run", BITS) for each in (name, other)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-4)
    assert len(bits[0]) == 2


def test_half_precision_has_the_same_bits_per_dim(runs: Path) -> None:
    """Within 0.01 of about 9."""
    bits = [values(runs / name / "run", BITS)[-1] for name in ("pixels", "bf16")]
    assert bits[0] == pytest.approx(bits[1], abs=0.01)


def test_it_learns(runs: Path) -> None:
    for name in ("pixels", "unet"):
        bits = values(runs / name / "run", BITS)
        assert bits[1] < bits[0]


def test_resumed_or_killed_it_goes_on_to_the_same_bits(runs: Path, resumed: Path) -> None:
    for name in RESUMED:
        same_bits(resumed / name / "run", runs / name / "run")
    for name in KILLED:
        out, world = resumed / f"{name} killed", CASES[name][0]
        assert end(out).codes == [None] * world
        codes, output = end(out / "again")
        assert codes == [0] * world, output
        assert "resumes at step 4:" in output
        same_bits(out / "run", runs / name / "run")


def test_evaluation_and_validation_agree(runs: Path, tmp_path: Path) -> None:
    """And a diffusion over latents has the reconstructions and the distortion of its base, in the mean over draws."""
    out = tmp_path / "found.json"
    names = ["pixels", "latents", "flow", "fixed", "kl", "coarsest", "hvae"]
    places = [runs / name / "run" for name in names]
    assert called(evaluate, "evaluate", "--run", *places, "--out", out) == 0
    found = dict(zip(names, json.loads(out.read_text()), strict=True))
    for name in names:
        assert found[name]["bits_per_dim"] == pytest.approx(values(runs / name / "run", BITS)[-1], rel=1e-5)
    for name, base in (("latents", "kl"), ("flow", "kl"), ("coarsest", "hvae")):
        assert found[name]["psnr"] == pytest.approx(found[base]["psnr"], rel=1e-6)
        assert found[name]["distortion"] == pytest.approx(found[base]["distortion"], rel=0.02)
        assert found[name]["bits_per_dim"] == pytest.approx(found[name]["rate"] + found[name]["distortion"], rel=1e-6)
    for name, count in (("pixels", 4), ("latents", 5), ("fixed", 4), ("coarsest", 6)):  # the last has that of z1, too
        parts = [value for part, value in found[name].items() if part.startswith("rate/")]
        assert sum(parts) == pytest.approx(found[name]["rate"], rel=1e-6)
        assert len(parts) == count
    assert "psnr" not in found["pixels"]  # an image is its own latent


def test_many_draws_are_averaged(runs: Path, tmp_path: Path) -> None:
    """They make the estimate better; there is no importance-weighted bound, as one level is drawn for each image."""
    out = tmp_path / "found.json"
    assert called(evaluate, "evaluate", "--run", runs / "pixels" / "run", "--iw", 3, "--out", out) == 0
    found = json.loads(out.read_text())
    assert "bits_per_dim_iw" not in found
    model, _ = trained.read_model(
        runs / "pixels" / "run", config := trained.read_config(runs / "pixels" / "run", []), torch.device("cpu")
    )
    slices = stream.ValidationSlices(config.data)
    batch: Any = slices[range(len(slices.samples.index))].batch
    with torch.no_grad():
        bounds = [model.bound(batch, draw) for draw in range(3)]  # type: ignore[operator]
    nats = sum(float((bound.rate.sum(0) + bound.distortion).double().mean()) for bound in bounds) / 3
    assert found["bits_per_dim"] == pytest.approx(nats / 768 / 0.6931471805599453, rel=1e-5)


def test_samples_are_drawn(runs: Path, tmp_path: Path) -> None:
    for name in ("pixels", "latents", "vectors", "coarsest"):
        words = ["--run", runs / name / "run", "generate", "--count", 7, "--guidance", 2]
        assert called(sample, "sample", *words, "--out", tmp_path / name) == 0
        assert (tmp_path / name / "sample_generate.png").exists()


def test_what_means_nothing_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--run", runs / "pixels" / "run", "generate", "--temperature", "0.7", "--out", tmp_path]
    assert called(sample, "sample", *words) == 2
    assert "a diffusion has no temperature 0.7: leave it at 1" in capsys.readouterr().err
    assert called(sample, "sample", *words[:3], "--top-k", 3, "--out", tmp_path) == 2
    assert "are for priors over codes, not for a diffusion" in capsys.readouterr().err


@pytest.fixture(scope="module")
def refused(runs: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    folder = tmp_path_factory.mktemp("refused")
    start = ["launch/train.py", "--config", str(CONFIG), *settings_of(runs, pictures, "latents")]
    unmeasured = untrained(folder / "base", "tiny_kl", pictures)
    commands = {
        "unmeasured": [*start, f"run={folder / 'd'}", f"model.over={unmeasured}"],
        "missing": [*start, f"run={folder / 'a'}", f"model.over={folder / 'none'}"],
        "size": [*start, f"run={folder / 'b'}", "data.size=32"],
        "stranger": [*start, f"run={folder / 'c'}", f"model.over={runs / 'pixels' / 'run'}"],
    }
    forked(folder, [job(folder / name, words) for name, words in commands.items()])
    return {name: end(folder / name) for name in commands}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("unmeasured", "the latents of .*base have not been measured: run its training command again"),
        ("missing", "model.over=.*none is not a run directory: set it to the run= of a training"),
        ("size", "data.size=32 is not that of .*, whose latents are modelled: set data.size=16"),
        ("stranger", "model.over must be the run of a model whose coarsest latents are continuous"),
    ],
)
def test_what_does_not_fit_is_one_sentence(refused: dict[str, End], name: str, sentence: str) -> None:
    codes, output = refused[name]
    assert codes == [2]
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert re.search(sentence, line), line


def test_other_statistics_of_the_latents_are_another_base(runs: Path, tmp_path: Path) -> None:
    """They decide what a diffusion's data are, although they change neither latents nor images."""
    for name in ("kl", "latents"):
        shutil.copytree(runs / name, tmp_path / name)
    config = trained.read_config(tmp_path / "latents" / "run", [f"model.over={tmp_path / 'kl' / 'run'}"])
    trained.read_model(tmp_path / "latents" / "run", config, torch.device("cpu"))
    (checkpoint,) = (tmp_path / "kl" / "run" / "checkpoints").glob("step-*12")
    tensors = load_file(checkpoint / "ema.safetensors")
    tensors["latent_std"] *= 2
    forge(checkpoint, "ema.safetensors", save(tensors))
    with pytest.raises(ConfigError, match=r"the frozen model that .* was started with has changed"):
        trained.read_model(tmp_path / "latents" / "run", config, torch.device("cpu"))
