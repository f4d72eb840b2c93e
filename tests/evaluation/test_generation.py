from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from vaescale import settings
from vaescale.evaluation.drawing import Unsupported
from vaescale.evaluation.generation import generated, labels_of
from vaescale.interfaces import Condition, Model
from vaescale.models.pca import PCA

FAMILIES = {
    "vae": ["tiny_vae", "model.classes=7", "model.likelihood.kind=logistic-mixture"],
    "vae, attributes": ["tiny_vae", "data.attributes=[age, height]", "model.classes=0"],
    "hvae": ["tiny_hvae"],
    "vdvae": ["tiny_vdvae"],
    "kl": ["tiny_kl"],
    "pca": ["../../configs/pca_digits", "model.latent_dim=5"],
    "pca of patches": ["../../configs/pca_digits", "model.latent_dim=5", "model.patch=4"],
}
COUNT, SEED = 70, 3


def build(name: str) -> tuple[Model, settings.Config]:
    """A model whose samples differ."""
    file, *given = FAMILIES[name]
    config = settings.load(f"tests/integration/{file}.yaml", ["run=x", "data.root=x", *given])
    torch.manual_seed(0)
    model = settings.build(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        if isinstance(model, PCA):
            model.components.normal_()
            model.variance.fill_(0.01)
    return model, config


def condition(config: settings.Config, count: int) -> Condition:
    return Condition(torch.full((count,), -1), torch.full((count, len(config.data.attributes)), torch.nan))


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_what_is_drawn_for_an_image_depends_on_its_number_alone(name: str) -> None:
    model, config = build(name)
    said = condition(config, 3)
    images = []
    for second in (9, -(2**62)):
        torch.rand(second % 5)  # torch's generator is somewhere else
        images.append(model.decode([], said, 0.8, sample=torch.tensor([5, second, 2**63 - 1])))
    same = (images[0] == images[1]).flatten(1).all(1)
    assert same.tolist() == [True, False, True]
    assert not torch.equal(images[0][0], images[0][2])
    assert torch.equal(model.decode([], said, 0.0, sample=torch.tensor([1, 2, 3])), model.decode([], said, 0.0))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_images_do_not_depend_on_ranks_or_batches(name: str) -> None:
    """Up to rounding in the decoder, which may move a pixel by one level."""
    model, config = build(name)
    counts = [3, 0, 5, 1, 1, 9, 2][: getattr(config.model, "classes", 0)]
    given = {"class_counts": counts, "seed": SEED, "attributes": len(config.data.attributes), "labels": "data"}
    (whole,) = generated(model, COUNT, batch=COUNT, **given)
    assert whole.x.shape[0] == COUNT
    assert len({image.numpy().tobytes() for image in whole.x}) == COUNT
    for batch, world in ((1, 1), (7, 1), (64, 1), (64, 2), (7, 3)):
        parts = [
            part
            for rank in range(world)
            for part in generated(model, COUNT, rank=rank, world=world, batch=batch, **given)
        ]
        assert max(len(part.x) for part in parts) == min(batch, -(-COUNT // world))
        number, label, x = (torch.cat(each) for each in zip(*parts, strict=True))
        assert number.tolist() == list(range(COUNT))
        assert torch.equal(label, whole.label)
        difference = (x.int() - whole.x.int()).abs()
        assert difference.max() <= 1
        assert difference.float().mean() < 1e-3
    assert not torch.equal(next(generated(model, COUNT, **{**given, "seed": SEED + 1})).x, whole.x[:64])


def test_without_a_prior_it_says_so() -> None:
    config = settings.load("tests/integration/tiny_autoencoder.yaml", ["run=x", "data.root=x"])
    with pytest.raises(Unsupported, match="an autoencoder has no prior to draw samples from"):
        next(generated(settings.build(config), 3))


def chi_square(found: Tensor, shares: np.ndarray) -> float:
    expected = shares * len(found)
    counts = np.bincount(found.numpy(), minlength=len(shares))
    assert counts[shares == 0].sum() == 0
    return float(((counts - expected)[shares > 0] ** 2 / expected[shares > 0]).sum())


@pytest.mark.parametrize(
    ("rule", "shares"), [("random", lambda counts: np.ones_like(counts)), ("data", lambda counts: counts)]
)
def test_labels_have_the_frequencies_of_their_rule(rule: str, shares: Callable[[np.ndarray], np.ndarray]) -> None:
    counts = np.array([100.0, 0, 7, 1200, 33, 1])
    expected = shares(counts) / shares(counts).sum()
    number = torch.arange(40_000)
    given = [int(count) for count in counts]
    label = labels_of(number, rule, given, seed=0)
    assert chi_square(label, expected) < 20.5  # 0.999 of the distribution with 5 degrees of freedom
    part = torch.tensor([39_999, 5, 77])
    assert torch.equal(labels_of(part, rule, given, seed=0), label[part])
    assert not torch.equal(labels_of(number, rule, given, seed=1), label)


def test_equal_labels_and_none() -> None:
    number = torch.arange(2, 9)
    assert labels_of(number, "equal", [5, 1, 1], seed=4).tolist() == [2, 0, 1, 2, 0, 1, 2]
    for rule in ("equal", "random", "data"):
        assert labels_of(number, rule, [], seed=4).tolist() == [-1] * 7
