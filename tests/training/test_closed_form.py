"""The closed form of PCA, and gradient descent on the same problem."""

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as Reference

from tests.models.test_pca import batch, digits, textures
from vaescale import settings
from vaescale.advice.dry_run import dry_run
from vaescale.config import ConfigError
from vaescale.interfaces import Shape
from vaescale.models.pca import PCA, Config
from vaescale.training.closed_form import ClosedForm
from vaescale.training.descent import Descent

CONFIGS = Path(__file__).parent.parent.parent / "configs"


def learner(samples: int) -> ClosedForm:
    config = settings.load(CONFIGS / "pca_digits.yaml", [])
    return ClosedForm(PCA(Config(latent_dim=4), Shape(3, 8)), config, samples)


def test_images_after_the_epoch_do_not_count() -> None:
    """200 images in batches of two micro-batches of 32: the fourth batch has 8 of them, the next epoch fills it."""
    x = textures()
    whole, masked = learner(200), learner(200)
    whole.step([batch(x)], 0)
    endless = torch.cat([x, x.flip(0)])
    for step in range(4):
        parts = [
            batch(endless[g : g + 32])._replace(sample=torch.arange(g, g + 32)) for g in (64 * step, 64 * step + 32)
        ]
        masked.step(parts, step)
    whole.refresh()
    masked.refresh()
    assert int(masked.moments.count) == 200
    for name, value in whole.model.state_dict().items():
        assert torch.equal(masked.model.state_dict()[name], value), name


def test_a_resumed_run_ends_with_the_same_bits() -> None:
    x = textures()
    whole, first, second = learner(200), learner(200), learner(200)
    whole.step([batch(x)], 0)
    first.step([batch(x[:70])], 0)
    first.refresh()
    saved = {file: {name: value.clone() for name, value in held.items()} for file, held in first.tensors().items()}
    second.load(lambda file, _: saved[file], {})
    assert torch.equal(second.model.components, first.model.components)
    second.step([batch(x[70:])._replace(sample=torch.arange(70, 200))], 1)
    whole.refresh()
    second.refresh()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(second.model.state_dict()[name], value), name


def test_the_training_loss_is_that_of_the_last_solution() -> None:
    x = textures()
    learned = learner(400)
    learned.step([batch(x)], 0)
    learned.refresh()
    means = learned.step([batch(x[:50]), batch(x[50:100])], 1)
    torch.testing.assert_close(means["loss"], learned.model(batch(x[:100]), 1).loss)
    values = learned.report({name: float(value) for name, value in means.items()}, 2)
    assert values.keys() == {"train/loss", "train/mse", "train/psnr", "train/explained"}
    assert 0 < values["train/explained"] < 1


@pytest.mark.parametrize(
    ("position", "steps"),
    [((0, 0), 12), ((4, 512), 12), ((4, 256), 14), ((12, 1536), 12)],
    ids=["scratch", "resumed", "resumed with twice the batch", "finished"],
)
def test_a_run_has_as_many_steps_as_one_epoch(position: tuple[int, int], steps: int) -> None:
    config = settings.load(CONFIGS / "pca_digits.yaml", ["global_batch=128", "steps=3"])
    assert ClosedForm.planned(config, lambda: 1500, *position) == steps


def test_nothing_is_averaged() -> None:
    """The model itself, not an average, is validated and saved."""
    learned = learner(200)
    assert learned.averaged is learned.model


def test_a_dry_run_says_the_steps_and_the_moments(pictures: Path) -> None:
    overrides = [f"data.root={pictures}", "data.channels=3", "global_batch=20"]
    text = dry_run(settings.load(CONFIGS / "pca_digits.yaml", overrides), world=2)
    assert "10 (micro) × 1 (accumulation) × 2 (world) = 20 images" in text
    assert "5 steps of 20 images" in text
    assert "steps: 5" in text
    assert "moments 4.5 MiB" in text  # (3 · 16 · 16)² · 8 bytes


def test_an_image_too_large_is_refused_before_training() -> None:
    config = settings.load(CONFIGS / "pca_digits.yaml", ["data.size=256"])
    with pytest.raises(ConfigError, match=r"set model\.patch to a side that divides data\.size=256"):
        settings.check(config, 1)
    settings.check(settings.load(CONFIGS / "pca_digits.yaml", ["data.size=256", "model.patch=16"]), 1)


def test_a_linear_autoencoder_finds_the_principal_subspace_by_other_axes(group: None) -> None:
    """All digits in each step, ten latents: the eleventh eigenvalue is .77 of the tenth, and the gap decides how soon
    the subspaces meet."""
    x = digits()
    overrides = ["data.size=8", "steps=1000", f"global_batch={len(x)}"]
    config = settings.load(CONFIGS / "ae_linear_digits.yaml", overrides)
    torch.manual_seed(0)
    model = settings.build(config)
    descent = Descent(model, config)
    for step in range(config.steps):
        descent.step([batch(x)], step)

    rows = x.flatten(1).double().numpy() / 255
    reference = Reference(10, svd_solver="full").fit(rows)
    least = np.square(rows - reference.inverse_transform(reference.transform(rows))).sum(1).mean()
    assert least <= float(model(batch(x), 0).loss.detach()) < 1.01 * least
    axes = model.decoder.weight.detach().double().numpy()
    cosines = np.linalg.svd(reference.components_ @ np.linalg.qr(axes)[0], compute_uv=False)
    assert np.degrees(np.arccos(cosines.min())) < 1
    axes /= np.linalg.norm(axes, axis=0)
    assert np.abs(axes.T @ axes - np.eye(10)).max() > 0.1
