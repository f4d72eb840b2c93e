"""A decoder that is trained on the encoder of another run: latents stay as they are, at every ZeRO stage, with a critic
and after a stop."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from tests.conftest import samples
from tests.integration.conftest import STEPS, TINY, Case, forked, overrides, training, written
from tests.integration.test_export import call
from tests.integration.test_resume import rewind, same_bits
from vaescale import trained as runs
from vaescale.config import ConfigError
from vaescale.data import stream
from vaescale.data.shards import write
from vaescale.interfaces import Calibrated, Codec, Model, calibrated

TINY_KL, PRIOR = TINY.with_name("tiny_kl.yaml"), TINY.with_name("tiny_prior.yaml")
CASES = [Case(1), Case(2, "bf16"), Case(2, zero=1), Case(2, "fp16", 2)]
CRITIC = Case(2, zero=1, accumulation=2)
AGAIN = Case(2, zero=2, accumulation=3)
NEWEST = f"checkpoints/step-{STEPS:08d}"
LATENTS = ("encoder.", "quantizer.codebook", "quantizer.learner.", "net.encoder.")  # names of what they depend on


def tuning(folder: Path, case: Case, base: Path, pictures: Path, *more: str) -> dict[str, Any]:
    """A job that trains the decoder of `base` in folder/NAME/run."""
    given = overrides(case, folder / case.name / "run", pictures)
    return training(folder / case.name, TINY, [*given, f"init_from={base}", "train=decoder", *more], case.world)


@pytest.fixture(scope="module")
def tuned(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VQ-VAE, in base, and decoders that were trained on it: as in CASES, one with a critic, and one that was stopped
    and resumed from its step 8. The same for a KL autoencoder, in kl-base and kl."""
    folder = tmp_path_factory.mktemp("tuned")
    base = folder / "base" / "run"
    jobs = [training(folder / "base", TINY, overrides(Case(1), base, pictures))]
    jobs += [tuning(folder, case, base, pictures) for case in [*CASES, AGAIN]]
    critic = "adversarial={weight: 0.1, critic_start: 0, start: 0, width: 8, layers: 1}"
    jobs.append(tuning(folder, CRITIC, base, pictures, critic))
    given = {"data.root": pictures, "precision": "bf16"}
    jobs.append(training(folder / "kl-base", TINY_KL, written({**given, "run": folder / "kl-base" / "run"})))
    given |= {"init_from": folder / "kl-base" / "run", "train": "decoder", "zero_stage": 1, "data.root": others(folder)}
    jobs.append(training(folder / "kl", TINY_KL, written({**given, "run": folder / "kl" / "run"}), 2))
    forked(folder, jobs)
    run = folder / AGAIN.name / "run"
    run.rename(run.with_name("whole"))
    rewind(run.with_name("whole"), run)
    forked(folder, [tuning(folder, AGAIN, base, pictures)])
    return folder


def others(folder: Path) -> Path:
    """A data.root with other training images than `pictures`, and the same validation images."""
    write(folder / "others" / "train", samples(90, seed=2), 20, [])
    write(folder / "others" / "val", samples(11, seed=1), 4, [])
    return folder / "others"


def read(run: Path) -> tuple[Model, list[Tensor], float]:
    """Returns the averaged model, its latents of the validation images and their mean squared error."""
    config = runs.read_config(run, [])
    model, step = runs.read_model(run, config, torch.device("cpu"))
    assert step == STEPS
    assert isinstance(model, Codec)
    batch = stream.ValidationSlices(config.data)[range(11)].batch
    with torch.no_grad():
        latents = model.encode(batch)
        error = (model.decode(latents) - batch.x / 255).square().mean()
    return model, latents, float(error)


@pytest.mark.parametrize("name", [*(case.name for case in [*CASES, CRITIC, AGAIN]), "kl"])
def test_latents_stay_as_they_are_and_images_get_better(tuned: Path, name: str) -> None:
    before, latents, error = read(tuned / ("kl-base" if name == "kl" else "base") / "run")
    after, others, lower = read(tuned / name / "run")
    assert all(torch.equal(one, other) for one, other in zip(latents, others, strict=True))
    assert lower < error or name == CRITIC.name
    frozen = {key for key in before.state_dict() if key.startswith(LATENTS)}
    assert len(frozen) > 3
    for key, value in after.state_dict().items():
        if key in frozen:
            assert torch.equal(value, before.state_dict()[key]), key
    assert isinstance(before, Calibrated)
    assert isinstance(after, Calibrated)
    assert calibrated(after)
    for one, other in zip(before.calibration().values(), after.calibration().values(), strict=True):
        assert torch.equal(one, other) == (name == "kl")  # of latents: kept; of errors: measured again


@pytest.mark.parametrize("name", [*(case.name for case in [*CASES, CRITIC]), "kl"])
def test_only_the_decoder_has_an_optimizer_state(tuned: Path, name: str) -> None:
    with safe_open(tuned / name / "run" / NEWEST / "optimizer.safetensors", "pt") as file:
        moments = {key.partition("/")[0] for key in file.keys()}  # noqa: SIM118 (it is no dict)
    assert moments
    assert all(key.removeprefix("net.").startswith(("decoder.", "likelihood.")) for key in moments)


def test_old_codes_and_priors_take_the_new_decoder(tuned: Path, pictures: Path, tmp_path: Path) -> None:
    """And one that was trained on that decoder's run again, but no other codec."""
    base, once, codes = tuned / "base" / "run", tuned / Case(1).name / "run", tmp_path / "codes"
    given = {"data.root": pictures, "steps": 2}
    jobs = [training(tmp_path / "other", TINY, written({**given, "run": tmp_path / "other" / "run"}))]
    given |= {"init_from": once, "train": "decoder", "run": tmp_path / "twice" / "run"}
    jobs.append(training(tmp_path / "twice", TINY, written(given)))
    given = {"run": tmp_path / "prior" / "run", "data.root": pictures, "model.tokenizer": base, "steps": 2}
    jobs.append(training(tmp_path / "prior", PRIOR, written(given)))
    forked(tmp_path, jobs)
    assert call("codes", "--run", base, "--out", codes, "--split", "val", "data.workers=0") == 0
    twice, other = tmp_path / "twice" / "run", tmp_path / "other" / "run"
    for number, run in enumerate((once, twice)):
        out = tmp_path / f"images-{number}"
        assert call("decode", codes, "--run", run, "--out", out, "data.workers=0") == 0
        config = runs.read_config(tmp_path / "prior" / "run", [f"model.tokenizer={run}"])
        prior, _ = runs.read_model(tmp_path / "prior" / "run", config, torch.device("cpu"))
        decoder = runs.read_model(run, runs.read_config(run, []), torch.device("cpu"))[0].state_dict()
        assert all(torch.equal(value, decoder[name]) for name, value in prior.codec.state_dict().items())  # type: ignore[operator, union-attr]
    shards = [next((tmp_path / f"images-{number}" / "val").glob("*.tar")).read_bytes() for number in range(2)]
    assert shards[0] != shards[1]
    assert call("decode", codes, "--run", other, "--out", tmp_path / "none", "data.workers=0") == 2
    config = runs.read_config(tmp_path / "prior" / "run", [f"model.tokenizer={other}"])
    with pytest.raises(ConfigError, match=r"the frozen model that .* was started with has changed"):
        runs.read_model(tmp_path / "prior" / "run", config, torch.device("cpu"))


def test_a_critic_begins_anew(tuned: Path) -> None:
    assert not (tuned / "base" / "run" / NEWEST / "critic.safetensors").exists()
    assert (tuned / CRITIC.name / "run" / NEWEST / "critic.safetensors").exists()


def test_a_stopped_run_ends_with_the_same_bits(tuned: Path) -> None:
    same_bits(tuned / AGAIN.name / "run", tuned / AGAIN.name / "whole")
