import pytest
import torch

from tests.evaluation.test_feature_statistics import gathered
from vaescale.evaluation.metrics.inception_score import inception_score


def score(logits: torch.Tensor) -> tuple[float, float]:
    classes = gathered(torch.zeros(len(logits), 1), logits).classes
    assert classes is not None
    return inception_score(classes)


def test_certain_and_evenly_spread_classes_score_their_number() -> None:
    logits = 1000 * torch.eye(8)[torch.arange(80) % 8]
    assert score(logits) == pytest.approx((8, 0), abs=1e-9)


@pytest.mark.parametrize("logits", [torch.zeros(40, 5), torch.tensor([[0.0, 1.0, 2.0]]).repeat(40, 1)])
def test_classes_that_do_not_depend_on_the_image_score_one(logits: torch.Tensor) -> None:
    assert score(logits) == pytest.approx((1, 0), abs=1e-9)


def test_known_posteriors() -> None:
    """Half of the images have p = (.9, .1), half (.1, .9): the KL to (.5, .5) is log 2 − H(.9)."""
    shares = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).repeat(20, 1)
    entropy = -(0.9 * torch.tensor(0.9).log() + 0.1 * torch.tensor(0.1).log())
    assert score(shares.log()) == pytest.approx((2 * float((-entropy).exp()), 0), rel=1e-6)


def test_splits_are_averaged_and_empty_ones_left_out() -> None:
    """Five images fill five of ten splits, and a split of one image scores 1."""
    assert score(torch.randn(5, 3, generator=torch.Generator().manual_seed(0))) == pytest.approx((1, 0), abs=1e-12)
    logits = torch.cat([1000 * torch.eye(2).repeat(5, 1), torch.zeros(10, 2)])  # five splits score 2, five score 1
    assert score(logits) == pytest.approx((1.5, 0.5), abs=1e-9)
