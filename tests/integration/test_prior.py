"""Priors over codes, trained by the real learner and engine: on pictures and on codes, resumed, on several ranks, and
measured together with their tokenizer."""

import json
import math
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import norm

from launch import evaluate as command
from launch import export, sample
from tests.conftest import ROOT
from tests.faults.test_checkpoints import POINTS, End, end, job
from tests.integration.conftest import TINY, forked, losses, training, written
from tests.integration.test_resume import rewind, same_bits
from vaescale import distributed, trained
from vaescale.config import ConfigError
from vaescale.data import stream
from vaescale.interfaces import Batch

TINY_PRIOR = ROOT / "tests" / "integration" / "tiny_prior.yaml"
BITS = "val/bits_per_code"
MASKED = {"model.order": "masked"}
CASES = {  # name → ranks, settings
    "pictures": (1, {}),
    "codes": (1, {}),
    "two": (2, {}),
    "zero1": (2, {"zero_stage": 1}),
    "zero2": (2, {"zero_stage": 2, "accumulation": 2}),
    "bf16": (1, {"precision": "bf16"}),
    "masked": (1, MASKED),
    "masked_two": (2, MASKED),
    "random": (1, {"model.order": "random"}),
    "random_two": (2, {"model.order": "random"}),
    "pixelcnn": (1, {"model.net": "pixelcnn"}),
    "pixelcnn_two": (2, {"model.net": "pixelcnn"}),
}
RESUMED = ("codes", "two", "zero1", "zero2", "masked", "random", "pixelcnn")
KILLED = ("pictures", "zero1")  # while the checkpoint of step 8 is written


def called(module: object, name: str, *words: object) -> int:
    """Runs a command in this process."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, words)])
        patch.setattr(distributed, "init", lambda: torch.device("cpu"))
        return int(module.main(module.parse()))  # type: ignore[attr-defined]


def settings_of(folder: Path, name: str) -> list[str]:
    given = {
        "run": folder / name / "run",
        "model.tokenizer": folder / "tokenizer" / "run",
        "data.root": folder / ("pictures" if name == "pictures" else "codes"),
        **CASES[name][1],
    }
    return written(given)


@pytest.fixture(scope="module")
def runs(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer with two codebooks, its codes, and priors of them, each in NAME/run."""
    folder = tmp_path_factory.mktemp("priors")
    shutil.copytree(pictures, folder / "pictures")
    given = written({"run": folder / "tokenizer" / "run", "data.root": pictures, "model.quantizer.depth": 2})
    forked(folder, [training(folder / "tokenizer", TINY, given)])
    # The order of samples depends on the shards: 20 images in each, as in those of the pictures.
    words = ["codes", "--run", folder / "tokenizer" / "run", "--out", folder / "codes", "--per-shard", 20]
    assert called(export, "export", *words) == 0
    jobs = [training(folder / name, TINY_PRIOR, settings_of(folder, name), world) for name, (world, _) in CASES.items()]
    forked(folder, jobs)
    return folder


@pytest.fixture(scope="module")
def resumed(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resumed")
    jobs = []
    for name in KILLED:
        out, world = folder / f"{name} killed", CASES[name][0]
        words = ["launch/train.py", "--config", str(TINY_PRIOR), *settings_of(runs, name), f"run={out / 'run'}"]
        jobs.append(job(out, words, ["die", 0, POINTS[1], 8], world=world, killed=True))
        jobs.append(job(out / "again", words, world=world))
    for name in RESUMED:
        (folder / name).mkdir()
        rewind(runs / name / "run", folder / name / "run")
        given = [*settings_of(runs, name), f"run={folder / name / 'run'}"]
        jobs.append(training(folder / name, TINY_PRIOR, given, CASES[name][0]))
    forked(folder, jobs)
    return folder


def values(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def read(run: Path) -> Any:
    return trained.read_model(run, trained.read_config(run, []), torch.device("cpu"))[0]


def test_codes_and_pictures_train_alike(runs: Path) -> None:
    one, other = runs / "pictures" / "run", runs / "codes" / "run"
    assert losses(one) == pytest.approx(losses(other), abs=1e-6)
    for name in ("val/bits_per_code", "val/bits_per_code_train", "val/code_entropy", "val/bits_per_code/level1"):
        assert values(one, name) == pytest.approx(values(other, name), abs=1e-5)
        assert len(values(one, name)) == 2
    assert losses(one)[-1] < losses(one)[0] - 0.2


@pytest.mark.parametrize(
    ("name", "other", "bound"),
    [
        *(("codes", name, 1e-4) for name in ("two", "zero1", "zero2")),
        *((name, f"{name}_two", 1e-4) for name in ("masked", "random", "pixelcnn")),
    ],
)
def test_any_number_of_ranks_and_stage_trains_alike(runs: Path, name: str, other: str, bound: float) -> None:
    """Dropout, orders and masks are those of the samples, not of the ranks."""
    one, two = losses(runs / name / "run"), losses(runs / other / "run")
    assert one == pytest.approx(two, rel=bound)
    bits = [values(runs / each / "run", "val/bits_per_code") for each in (name, other)]
    assert bits[0] == pytest.approx(bits[1], rel=bound)


def test_half_precision_has_the_same_bits_per_dim(runs: Path) -> None:
    """Within 0.01: 32 codes of an image of 768 subpixels."""
    bits = [values(runs / name / "run", "val/bits_per_code")[-1] for name in ("codes", "bf16")]
    assert bits[0] * 32 / 768 == pytest.approx(bits[1] * 32 / 768, abs=0.01)


def test_a_resumed_prior_has_the_same_bits(runs: Path, resumed: Path) -> None:
    for name in RESUMED:
        same_bits(resumed / name / "run", runs / name / "run")


def test_a_killed_prior_goes_on_to_the_same_bits(runs: Path, resumed: Path) -> None:
    for name in KILLED:
        out, world = resumed / f"{name} killed", CASES[name][0]
        assert end(out).codes == [None] * world
        codes, output = end(out / "again")
        assert codes == [0] * world, output
        assert "resumes at step 4:" in output
        same_bits(out / "run", runs / name / "run")


@pytest.fixture(scope="module")
def longer(runs: Path, pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tokenizer, trained for one more step."""
    folder = tmp_path_factory.mktemp("longer")
    shutil.copytree(runs / "tokenizer" / "run", folder / "longer" / "run")
    given = {"run": folder / "longer" / "run", "data.root": pictures, "model.quantizer.depth": 2, "steps": 13}
    forked(folder, [training(folder / "longer", TINY, written(given))])
    return folder / "longer" / "run"


@pytest.fixture(scope="module")
def refused(runs: Path, longer: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    """The ends of commands that cannot run."""
    folder = tmp_path_factory.mktemp("refused")
    prior, changed = ["launch/train.py", "--config", str(TINY_PRIOR)], f"model.tokenizer={longer}"
    shutil.copytree(runs / "pictures" / "run", folder / "begun")
    commands = {
        "stranger": [*prior, *settings_of(runs, "codes"), f"run={folder / 'a'}", changed],
        "changed": [*prior, *settings_of(runs, "pictures"), f"run={folder / 'begun'}", changed, "steps=14"],
        "no prior": ["launch/train.py", "--config", str(TINY), f"run={folder / 'b'}", f"data.root={runs / 'codes'}"],
        "missing": [*prior, *settings_of(runs, "codes"), f"run={folder / 'c'}", f"model.tokenizer={folder / 'none'}"],
        "uniform": [*prior, *settings_of(runs, "codes"), f"run={folder / 'd'}", "model.net=uniform"],
        "size": [*prior, *settings_of(runs, "pictures"), f"run={folder / 'e'}", "data.size=32"],
        "heads": [*prior, *settings_of(runs, "pictures"), f"run={folder / 'f'}", "model.net=pixelcnn", "model.heads=5"],
    }
    forked(folder, [job(folder / name, words) for name, words in commands.items()])
    return {name: end(folder / name) for name in commands}


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("stranger", "were made by another tokenizer"),
        ("changed", "the frozen model that .* was started with has changed"),
        ("no prior", "holds codes, which a model of kind vqvae does not read: set data.root to pictures"),
        ("missing", "model.tokenizer=.*none is not a run directory: set it to the run= of a training"),
        ("uniform", "model.net=uniform has nothing to train: evaluate the tokenizer itself"),
        ("heads", "model.width=24 .* model.heads=5"),
        ("size", "data.size=32 is not that of .*, whose latents are modelled: set data.size=16"),
    ],
)
def test_what_does_not_fit_is_one_sentence(refused: dict[str, End], name: str, sentence: str) -> None:
    codes, output = refused[name]
    assert codes == [2]
    line = next(line for line in output.splitlines() if line.startswith("error: "))
    assert re.search(sentence, line), line


def test_the_bits_are_those_of_the_tokenizer_and_the_prior(runs: Path, tmp_path: Path) -> None:
    """Against sums over the validation set: log-probabilities of the codes by the prior, or by log2 K each, and of the
    8-bit values by a normal distribution."""
    names = ["codes", "pixelcnn", "tokenizer"]
    out = tmp_path / "found.json"
    assert called(command, "evaluate", "--run", *(runs / name / "run" for name in names), "--out", out) == 0
    found = dict(zip(names, json.loads(out.read_text()), strict=True))
    config = trained.read_config(runs / "codes" / "run", [])
    tokenizer = read(runs / "tokenizer" / "run")
    slices = stream.ValidationSlices(trained.pictures_of(config))
    batch: Batch = slices[range(11)].batch
    with torch.no_grad():
        codes = torch.stack(tokenizer.encode(batch), dim=1)
        mean = tokenizer.decode(list(codes.unbind(1))).double().numpy()
    x = batch.x.double().numpy()
    each = tokenizer.error_std.double().numpy()[:, None, None]
    high = np.where(x == 255, 1, norm.cdf((x + 0.5) / 255, mean, each))
    low = np.where(x == 0, 0, norm.cdf((x - 0.5) / 255, mean, each))
    distortion = -np.log2(high - low).mean()
    for name in names:
        assert found[name]["distortion"] == pytest.approx(distortion, rel=1e-4)
        assert found[name]["bits_per_dim"] == pytest.approx(distortion + found[name]["rate"], rel=1e-4)
    assert found["tokenizer"]["rate"] == pytest.approx(32 * math.log2(24) / 768)
    for name in ("codes", "pixelcnn"):
        prior = read(runs / name / "run")
        with torch.no_grad():
            rates = prior.rates(codes, batch.condition, batch.sample).double()
        assert found[name]["rate"] == pytest.approx(float(rates.sum()) / math.log(2) / 11 / 768, rel=1e-5)
        assert found[name]["bits_per_code"] == pytest.approx(float(rates.mean()) / math.log(2), rel=1e-5)
        assert found[name]["bits_per_code"] == pytest.approx(values(runs / name / "run", BITS)[-1], rel=1e-5)


def test_a_changed_tokenizer_is_refused(
    runs: Path, longer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for module in (command, sample):
        words = ["--run", runs / "pictures" / "run", "--out", tmp_path / "out", f"model.tokenizer={longer}"]
        assert called(module, "command", *words) == 2
        assert re.search("the frozen model that .* was started with has changed", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_bits_are_measured_on_the_pictures_of_the_codes(runs: Path, tmp_path: Path) -> None:
    """Not on others, which the tokenizer may have been trained on."""
    shutil.copytree(runs / "codes", tmp_path / "codes")
    config = trained.read_config(runs / "codes" / "run", [f"data.root={tmp_path / 'codes'}"])
    assert Path(trained.pictures_of(config).root) == Path(trained.read_config(runs / "tokenizer" / "run", []).data.root)
    index = tmp_path / "codes" / "val" / "index.json"
    head = json.loads(index.read_text())
    head["codes"]["source"] = "0" * 16
    index.write_text(json.dumps(head))
    with pytest.raises(ConfigError, match=r"were not made from .*: give data.root=… with the pictures"):
        trained.pictures_of(config)


def test_samples_are_drawn(runs: Path, tmp_path: Path) -> None:
    words = ["--run", runs / "masked" / "run", "generate", "--count", 7, "--guidance", 2, "--passes", 3]
    assert called(sample, "sample", *words, "--out", tmp_path) == 0
    assert (tmp_path / "sample_generate.png").exists()
