"""The VAE under real DeepSpeed: noise, dropped labels and free bits depend on neither the rank nor the history."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import webdataset
from safetensors.torch import load_file

from tests.conftest import ROOT, Start, finish, ranks, samples
from tests.integration.conftest import forked, losses, training, written
from tests.integration.test_resume import rewind_all, went_on_to_the_same_bits
from vaescale.data import digits
from vaescale.data.index import Fields
from vaescale.data.shards import index, name, write

TINY_VAE = Path(__file__).parent / "tiny_vae.yaml"


class Case(NamedTuple):
    world: int
    precision: str = "fp32"
    zero_stage: int = 0
    accumulation: int = 1

    @property
    def name(self) -> str:
        return "-".join(str(part) for part in self)


CASES = [
    Case(1),
    Case(2, zero_stage=1, accumulation=3),
    Case(2, "bf16"),
    Case(1, "fp16", 1),
    Case(2, "fp16", 1),
]


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data.root of pictures with a label and, except for every fifth, an age in their JSON."""
    root = tmp_path_factory.mktemp("described")
    for seed, (split, count) in enumerate({"train": 90, "val": 11}.items()):
        (root / split).mkdir()
        with webdataset.TarWriter(str(root / split / name(0))) as tar:
            for number, sample in enumerate(samples(count, seed)):
                said = {"age": 20 + number} if number % 5 else {}
                label, numbers = str(sample.label).encode(), json.dumps(said).encode()
                tar.write({"__key__": sample.key, "jpg": sample.image, "cls": label, "json": numbers})
        index(str(root / split), root / split, "*.tar", Fields(), 1)
    return root


def train(folder: Path, pictures: Path) -> None:
    """Train all cases, conditioned on label and age."""
    jobs = []
    for case in CASES:
        out = folder / case.name
        values = {"run": out / "run", "data.root": pictures, "data.attributes": "[age]", **case._asdict()}
        del values["world"]
        jobs.append(training(out, TINY_VAE, written(values), case.world))
    forked(folder, jobs)


@pytest.fixture(scope="module")
def trained(described: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vae")
    train(folder, described)
    return folder


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_is_that_of_one_process_on_the_joined_batch(trained: Path, case: Case) -> None:
    """ζ and the dropped labels depend on g, and the free latents on the global batch. So only sums, and in half
    precision the outputs of the networks, are rounded differently. fp16 is compared with fp16, whose first steps only
    find the loss scale. It communicates gradients in half precision, which moves single steps by two or three
    percent."""
    alone = Case(1, "fp16", 1) if case.precision == "fp16" else Case(1)
    curve, expected = losses(trained / case.name / "run"), losses(trained / alone.name / "run")
    assert curve == pytest.approx(expected, rel={"fp32": 1e-5, "bf16": 1e-2, "fp16": 5e-2}[case.precision])
    assert np.mean(curve) == pytest.approx(np.mean(expected), rel=1e-2)
    assert np.mean(curve[-3:]) < np.mean(curve[:3]) - 0.1  # the images of one step move its loss by 0.05
    rates = load_file(trained / alone.name / "rank-0.safetensors")["rates"]
    for rank in range(case.world):
        found = load_file(trained / case.name / f"rank-{rank}.safetensors")["rates"]
        assert found.dtype == torch.float32
        if case.precision == "fp32":
            torch.testing.assert_close(found, rates, rtol=1e-3, atol=1e-5)


def test_free_bits_and_warm_up_were_at_work(trained: Path) -> None:
    """Otherwise the test above would not cover them."""
    rates = load_file(trained / Case(1).name / "rank-0.safetensors")["rates"]
    free = 0.003  # tiny_vae.yaml
    assert (rates < free).any()
    assert (rates > free).any()


def test_the_attributes_were_at_work(trained: Path) -> None:
    """The value that replaces a missing age has been learned."""
    weights = load_file(trained / Case(1).name / "rank-0.safetensors")
    assert weights["conditioner.unknown"].abs() > 1e-3


def test_a_resumed_run_ends_in_the_same_bits(trained: Path, described: Path, tmp_path: Path) -> None:
    rewind_all(trained, tmp_path, CASES)
    train(tmp_path, described)
    went_on_to_the_same_bits(trained, tmp_path, CASES)


def test_a_label_that_the_model_does_not_know_is_one_sentence(pictures: Path, tmp_path: Path, start: Start) -> None:
    command = ["launch/train.py", "--config", str(TINY_VAE), f"run={tmp_path / 'run'}", f"data.root={pictures}"]
    (process,) = ranks(start, 1, [*command, "model.classes=5"])
    code, output = finish(process)
    assert code == 2
    assert "error: model.classes=5 allows the labels 0 to 4, but sample 5 of " in output
    assert "(in 000000.tar) has 5: set model.classes=7 or more, or use other data" in output
    assert "Traceback" not in output


def test_bf16_is_fp32_to_a_hundredth_of_a_bit(tmp_path: Path) -> None:
    """A shortened configs/vae_digits.yaml: bits/dim over the last steps of training agree."""
    samples = list(digits.read_digits())
    write(tmp_path / "digits" / "train", samples[:400], 100, [])
    write(tmp_path / "digits" / "val", samples[400:420], 100, [])
    jobs = []
    for precision in ("fp32", "bf16"):
        out = tmp_path / precision
        given = [f"run={out / 'run'}", f"data.root={tmp_path / 'digits'}", f"precision={precision}", "steps=100"]
        given += ["every.report=50", "every.validate=100", "every.checkpoint=100", "model.network.width=8"]
        jobs.append(training(out, ROOT / "configs" / "vae_digits.yaml", given))
    forked(tmp_path, jobs)
    found = []
    for job in jobs:
        lines = map(json.loads, (Path(job["out"]) / "run" / "metrics.jsonl").read_text().splitlines())
        found.append([line["train/bits_per_dim"] for line in lines if "train/bits_per_dim" in line])
    assert found[1] == pytest.approx(found[0], abs=0.01)
    assert found[0][-1] < found[0][0] - 0.5  # and it has learned
