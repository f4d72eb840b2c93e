"""Claims about the model families on the demo digits, measured on trained models that are narrower than those of
configs/ and trained for fewer steps. `pytest -s` prints the numbers."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from tests.conftest import begin, finish
from vaescale import trained
from vaescale.data import stream
from vaescale.data.digits import write_digits
from vaescale.evaluation.drawing import from_prior
from vaescale.interfaces import Batch, Condition, Model
from vaescale.monitoring.pictures import to_bytes

SAMPLES = 1000
SMALLER = [
    "model.network.width=8", "model.network.halvings=2", "model.network.hidden=128", "steps=600",
    "global_batch=64", "optimizer.lr=4e-3", "optimizer.warmup_steps=50", "ema_decay=0.98", "data.augment=false",
    "data.workers=0", "every.validate=1000", "every.checkpoint=1000",
]  # fmt: skip
FAMILIES = ("ae", "vae", "cvae")

Pixels = NDArray[np.float64]  # [B, 256], in [0, 1]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    write_digits(root)
    return root


@pytest.fixture(scope="module")
def families(digits: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    folder = tmp_path_factory.mktemp("families")
    command = [sys.executable, "launch/train.py", *SMALLER, f"data.root={digits}"]
    started = [
        begin([*command, "--config", f"configs/{family}_digits.yaml", f"run={folder / family}"]) for family in FAMILIES
    ]
    for process in started:
        code, output = finish(process)
        assert code == 0, output
    models = {}
    for family in FAMILIES:
        run = folder / family
        models[family], _ = trained.read_model(run, trained.read_config(run, []), torch.device("cpu"))
    return models


@pytest.fixture(scope="module")
def real(digits: Path) -> tuple[Batch, Batch]:
    """(all training digits, all held-out digits), as input of the models."""
    slices = stream.ValidationSlices(stream.Config(root=str(digits), size=16, channels=1, workers=0))
    held_out = slices[range(len(slices.samples.index))].batch
    slices.samples = stream.Samples(digits / "train")
    return slices[range(len(slices.samples.index))].batch, held_out


@pytest.fixture(scope="module")
def frechet(real: tuple[Batch, Batch]) -> Callable[[Pixels], float]:
    """Fréchet distance to the held-out digits in the space of the 32 leading components of the training digits."""
    training, held_out = map(pixels, real)
    components = PCA(32).fit(training)

    def distance(images: Pixels) -> float:
        a, b = components.transform(images), components.transform(held_out)
        products = np.linalg.eigvals(np.cov(a.T) @ np.cov(b.T)).real.clip(min=0)
        means = np.square(a.mean(0) - b.mean(0)).sum()
        return means + np.trace(np.cov(a.T) + np.cov(b.T)) - 2 * np.sqrt(products).sum()

    return distance


@pytest.fixture(scope="module")
def nearest(real: tuple[Batch, Batch]) -> Callable[[Pixels], float]:
    """Mean distance to the nearest training digit."""
    training = torch.from_numpy(pixels(real[0]))
    return lambda images: float(torch.cdist(torch.from_numpy(images), training).amin(1).mean())


def pixels(images: Batch | torch.Tensor) -> Pixels:
    x = images.x if isinstance(images, Batch) else images
    return x.flatten(1).numpy() / 255


def decoded(model: Model, z: torch.Tensor) -> Pixels:
    with torch.no_grad():
        return pixels(to_bytes(model.decode([z])))


def test_an_autoencoder_without_a_prior_decodes_no_digits_from_noise(
    families: dict[str, Model],
    real: tuple[Batch, Batch],
    frechet: Callable[[Pixels], float],
    nearest: Callable[[Pixels], float],
) -> None:
    dim = families["vae"].encode(real[1])[0].shape[1]
    assert families["ae"].encode(real[1])[0].shape[1] == dim
    z = torch.randn(SAMPLES, dim, generator=torch.Generator().manual_seed(0))
    far, near = {}, {}
    for family in ("ae", "vae"):
        images = decoded(families[family], z)
        far[family], near[family] = frechet(images), nearest(images)
    print(f"\nFréchet distance of decoded N(0, I): autoencoder {far['ae']:.2f}, VAE {far['vae']:.2f}")
    print(
        f"distance to the nearest training digit: autoencoder {near['ae']:.2f}, VAE {near['vae']:.2f}, "
        f"held-out digits {nearest(pixels(real[1])):.2f}"
    )
    assert far["ae"] > 2 * far["vae"]
    assert near["ae"] > 1.2 * near["vae"]


def test_the_middle_between_two_digits_is_nearer_to_digits_than_their_mean(
    families: dict[str, Model], real: tuple[Batch, Batch], nearest: Callable[[Pixels], float]
) -> None:
    vae, (_, x) = families["vae"], real
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randint(len(x.x), (2, SAMPLES), generator=generator)
    differ = x.label[one] != x.label[two]
    one, two = one[differ], two[differ]
    with torch.no_grad():
        (z,) = vae.encode(x)
    between = nearest(decoded(vae, (z[one] + z[two]) / 2))
    means = nearest((pixels(x.x[one]) + pixels(x.x[two])) / 2)
    smooth = decoded(vae, z)  # so that the decoder's blur explains no difference
    smooth_means = nearest((smooth[one] + smooth[two]) / 2)
    print(
        f"\ndistance to the nearest training digit: between two of different class in the latents {between:.2f}, their "
        f"mean {means:.2f}, the mean of their reconstructions {smooth_means:.2f}"
    )
    assert between < 0.95 * smooth_means
    assert between < 0.95 * means


def test_a_conditional_vae_draws_the_digit_that_it_is_told(
    families: dict[str, Model], real: tuple[Batch, Batch]
) -> None:
    training, held_out = real
    classifier = SVC(C=10).fit(pixels(training), training.label.numpy())
    right = classifier.score(pixels(held_out), held_out.label.numpy())
    label = torch.arange(SAMPLES) % 10
    drawn = pixels(from_prior(families["cvae"], Condition(label, torch.zeros(SAMPLES, 0)), seed=0))
    obeyed = classifier.score(drawn, label.numpy())
    print(f"\na support vector machine is right on {right:.1%} of held-out digits, agrees on {obeyed:.1%} of samples")
    assert right > 0.95
    assert obeyed >= 0.9
