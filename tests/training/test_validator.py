from pathlib import Path

import pytest
import torch

from tests.test_library import untrained
from vaescale import settings, trained
from vaescale.config import ConfigError
from vaescale.data import stream
from vaescale.evaluation.compare import Gathering, Request, compared
from vaescale.evaluation.evaluate import evaluate, reconstruct
from vaescale.evaluation.generation import generated
from vaescale.interfaces import Model
from vaescale.nn import features, perceptual
from vaescale.training import validator as module
from vaescale.training.validator import Validator

CPU = torch.device("cpu")
GIVEN = ["data.workers=0", "every.evaluate=2", "evaluation.features=random"]


def read(tmp_path: Path, name: str, pictures: Path, *overrides: str) -> tuple[settings.Config, Model]:
    run = untrained(tmp_path, name, pictures)
    config = trained.read_config(run, [*GIVEN, *overrides])
    model, _ = trained.read_model(run, config, CPU)
    return config, model


def built(config: settings.Config, model: Model) -> Validator:
    return Validator(config, model, stream.ValidationSlices(config.data), CPU, 4)


def test_images_are_compared_on_request_only_and_nothing_is_drawn(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Numbers are those of the functions that measure the parts."""
    lpips = perceptual.drawn("perceptual_random")
    monkeypatch.setattr(perceptual, "read", {"lpips_vgg": lpips}.__getitem__)
    chosen = ["evaluation.metrics=[rkid,gfd,rfd]", "evaluation.count=7"]
    config, model = read(tmp_path, "tiny_vae", pictures, *chosen)
    validator = built(config, model)
    about = "evaluation every 2 steps: rfd_random, rkid_random, gfd_random on 7 of 11 validation images; with LPIPS"
    assert validator.about == about
    torch.manual_seed(3)
    plain = validator.measure(False, lambda: False)
    drawn = torch.get_rng_state()  # a DataLoader draws a number that nothing uses
    torch.manual_seed(3)
    found = validator.measure(True, lambda: False)
    assert torch.equal(torch.get_rng_state(), drawn)

    slices = validator.slices
    assert plain == evaluate(model, slices, CPU, 4)
    batch = stream.chosen_images(slices, [number * 11 // 7 for number in range(7)])
    net = features.drawn("random")
    (samples,) = generated(model, 7, class_counts=[1] * config.model.classes, attributes=len(config.data.attributes))
    sides = []
    for x in (batch.x, reconstruct(model, batch)[0], samples.x):
        sides.append(Gathering([net], 7, x[:1]))
        sides[-1].add(torch.arange(7), x)
    x, y, z = (side.result() for side in sides)
    expected = compared([Request("r", name, net.words) for name in ("fd", "kid")], x, y)
    expected |= compared([Request("g", "fd", net.words)], x, z)
    assert found == pytest.approx({**evaluate(model, slices, CPU, 4, distance=lpips), **expected}, rel=1e-9)
    assert found["perceptual_random"] > 0

    seen: list[int] = []
    monkeypatch.setattr(Gathering, "add", lambda self, samples, x: seen.append(len(self.nets)))
    validator.measure(True, lambda: True)
    assert seen[0] == 0  # the features of the validation images are known


@pytest.mark.parametrize("batches", [1, 3, 4])
def test_what_is_stopped_has_no_result_and_can_be_repeated(pictures: Path, tmp_path: Path, batches: int) -> None:
    """Three batches of reconstructions are followed by one of generated images."""
    config, model = read(tmp_path, "tiny_vae", pictures, "evaluation.metrics=[rkid,gkid]")
    whole = built(config, model).measure(True, lambda: False)
    validator = built(config, model)
    left = iter([False] * (batches - 1) + [True])
    assert validator.measure(True, lambda: next(left)) == {}
    assert validator.measure(True, lambda: False) == whole


@pytest.mark.parametrize(
    ("name", "overrides", "words"),
    [
        ("tiny_vae", ["evaluation.features=inception"], r"inception.safetensors does not exist: fetch weights-incepti"),
        ("tiny_vae", ["evaluation.metrics=[gpr]", "evaluation.count=5"], "gpr needs at least 6 images on each side"),
        ("tiny", ["evaluation.metrics=[gkid]"], "no images can be generated: "),
    ],
)
def test_what_is_impossible_is_refused_at_the_start(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, overrides: list[str], words: str
) -> None:
    monkeypatch.setenv("VAESCALE_WEIGHTS", str(tmp_path))
    config, model = read(tmp_path, name, pictures, *overrides)
    monkeypatch.setattr(features.Features, "__call__", None)  # it would take seconds
    with pytest.raises(ConfigError, match=f"every.evaluate=2 is impossible: .*{words}"):
        built(config, model)


def test_lpips_is_left_out_where_its_weights_are_not(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VAESCALE_WEIGHTS", str(tmp_path))
    config, model = read(tmp_path, "tiny", pictures)
    about = built(config, model).about
    words = "evaluation every 2 steps: rkid_random on 11 validation images; without LPIPS, because "
    assert about.startswith(f"{words}{tmp_path}/lpips_vgg.safetensors does not exist: fetch vgg16-397923af.pth")
    distance, why = module.read_lpips(8)
    assert distance is None
    assert "does not exist" in why


def test_nothing_is_read_without_evaluations(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "read_net", None)
    config, model = read(tmp_path, "tiny", pictures, "every.evaluate=0", "evaluation.features=inception")
    assert built(config, model).about == ""
