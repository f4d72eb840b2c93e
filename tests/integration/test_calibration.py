"""The statistics of a KL autoencoder's latents: on any number of ranks, after a stop, in runs begun without them."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save

import vaescale
from tests.conftest import samples
from tests.faults.test_checkpoints import end, job
from tests.integration.conftest import forked, written
from tests.integration.test_resume import rewind, same_bits
from tests.lifecycle.test_checkpoint import forge
from vaescale.data import stream
from vaescale.data.shards import write
from vaescale.interfaces import calibrated

TINY_KL = Path(__file__).parent / "tiny_kl.yaml"
COUNT = 91  # no multiple of 2 or 3
NAMES = ("latent_mean", "latent_std")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    write(root / "train", samples(COUNT), 20, [])
    write(root / "val", samples(11, seed=1), 4, [])
    return root


def train(run: Path, images: Path, *given: str) -> list[str]:
    return ["launch/train.py", "--config", str(TINY_KL), *written({"run": run, "data.root": images}), *given]


CUT = {"SIGTERM": (2, [75, 75]), "SIGKILL": (1, [None])}  # signal → number of ranks, their exit codes


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    jobs: list[dict[str, Any]] = []
    for world in (1, 2):
        out = folder / f"whole-{world}"
        jobs.append(job(out, train(out / "run", images), world=world))
    for name, (world, _) in CUT.items():
        out = folder / name
        command = train(out / "run", images)
        jobs.append({**job(out, command, ["interrupt calibration", world - 1, name], world=world), "code": None})
        jobs.append(job(out / "again", command, world=world))
    forked(folder, jobs)
    jobs = []
    for name in ("finished", "longer"):
        shutil.copytree(folder / "whole-1" / "run", folder / name / "run")
    rewind(folder / "whole-1" / "run", folder / "older" / "run")
    for name in ("older", "finished"):
        for checkpoint in (folder / name / "run" / "checkpoints").glob("step-*"):
            without_statistics(checkpoint)
    shutil.copytree(folder / "finished" / "run", folder / "begun")
    for name, given in {"older": [], "finished": [], "longer": ["steps=14"]}.items():
        jobs.append(job(folder / name, train(folder / name / "run", images, *given)))
    forked(folder, jobs)
    return folder


def without_statistics(checkpoint: Path) -> None:
    """Makes a checkpoint one of a version that had none."""
    for name in ("model", "ema"):
        file = checkpoint / f"{name}.safetensors"
        tensors = {key: value for key, value in load_file(file).items() if key not in NAMES}
        forge(checkpoint, file.name, save(tensors))


def found(run: Path, file: str = "ema", step: int = 12) -> list[torch.Tensor]:
    tensors = load_file(run / "checkpoints" / f"step-{step:08d}" / f"{file}.safetensors")
    return [tensors[name] for name in NAMES]


def matches_the_weights(run: Path, images: Path, step: int = 12) -> None:
    """The statistics that the run holds are those of its averaged weights, in fp64 over all images at once."""
    model = vaescale.load(run)
    slices = stream.TrainingOnce(model.config.data)
    with torch.no_grad():
        mean, std = (part.double() for part in model.codec.posterior(slices[range(COUNT)].batch))
    means = mean.mean((0, 2, 3))
    deviations = (mean.var((0, 2, 3), correction=0) + std.square().mean((0, 2, 3))).sqrt()
    for held, expected in zip(found(run, step=step), (means, deviations), strict=True):
        torch.testing.assert_close(held.double(), expected, rtol=1e-6, atol=1e-7)
    for held, loaded in zip(found(run, step=step), model.codec.latent_statistics(), strict=True):
        assert torch.equal(held, loaded)


def test_any_number_of_ranks_gives_the_same(images: Path, tmp_path: Path) -> None:
    """Also more ranks than images."""
    worlds = [(1, 100), (2, 7), (3, 5), (3, 91)]
    one = tmp_path / "one"
    write(one / "train", samples(2), 20, [])
    jobs = [{"world": world, "micro": micro, "root": str(images)} for world, micro in worlds]
    jobs += [{"world": world, "micro": 4, "root": str(one)} for world in (1, 3)]
    outs = [tmp_path / str(number) for number in range(len(jobs))]
    forked(tmp_path, [{**one, "task": "measured", "out": str(out)} for one, out in zip(jobs, outs, strict=True)])
    for part in (slice(len(worlds)), slice(len(worlds), None)):
        expected = np.array(json.loads((outs[part][0] / "measured-0.json").read_text()))
        assert np.isfinite(expected).all()
        for given, out in zip(jobs[part], outs[part], strict=True):
            results = [(out / f"measured-{rank}.json").read_text() for rank in range(given["world"])]
            assert len(set(results)) == 1
            np.testing.assert_allclose(np.array(json.loads(results[0])), expected, rtol=1e-12)


@pytest.mark.parametrize("name", ["whole-1", "whole-2"])
def test_the_last_checkpoint_has_those_of_the_averaged_weights(trained: Path, images: Path, name: str) -> None:
    codes, output = end(trained / name)
    assert set(codes) == {0}, output
    assert output.count(f"calibrating on {COUNT} training images\n") == 1
    assert output.count(f"calibrated on {COUNT} training images: means of the latents ") == 1
    matches_the_weights(trained / name / "run", images)
    for value in (*found(trained / name / "run", "model"), *found(trained / name / "run", step=8)):
        assert value.isinf().all()
    for one, other in zip(found(trained / name / "run"), found(trained / "whole-1" / "run"), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)  # the weights differ


@pytest.mark.parametrize("name", CUT)
def test_a_stop_while_they_are_measured_does_not_change_them(trained: Path, name: str) -> None:
    world, codes = CUT[name]
    first, output = end(trained / name)
    assert first == codes, output
    assert ("stopped at step 12 (SIGTERM). Run the same command to continue." in output) == (name == "SIGTERM")
    assert f"calibrated on {COUNT} training images" not in output
    again, output = end(trained / name / "again")
    assert again == [0] * world, output
    assert f"resumes at step {12 if name == 'SIGTERM' else 8}:" in output
    same_bits(trained / name / "run", trained / f"whole-{world}" / "run")


def test_a_run_of_an_older_version_goes_on_and_gets_them(trained: Path) -> None:
    """One that was begun, and one that has finished, when the command is run again."""
    for name in ("older", "finished"):
        codes, output = end(trained / name)
        assert codes == [0], output
        assert f"resumes at step {8 if name == 'older' else 12}:" in output
        same_bits(trained / name / "run", trained / "whole-1" / "run")
    model = vaescale.load(trained / "begun").codec
    assert not calibrated(model)


def test_a_longer_run_measures_them_again(trained: Path, images: Path) -> None:
    codes, output = end(trained / "longer")
    assert codes == [0], output
    matches_the_weights(trained / "longer" / "run", images, step=14)
    assert not torch.equal(found(trained / "longer" / "run", step=14)[0], found(trained / "longer" / "run")[0])
