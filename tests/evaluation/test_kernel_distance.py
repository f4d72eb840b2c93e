from itertools import product

import numpy as np
import pytest
import torch

from vaescale.evaluation.metrics import kernel_distance as module
from vaescale.evaluation.metrics.kernel_distance import indicators, kernel_distance


def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (x @ y.T / x.shape[-1] + 1) ** 3


def test_the_mean_over_all_samples_is_the_distance_of_the_distributions() -> None:
    """Two distributions on three points each, and all samples of three images that can be drawn from each."""
    generator = np.random.default_rng(0)
    points = generator.normal(size=(2, 3, 2))
    shares = np.array([[0.5, 0.3, 0.2], [0.1, 0.2, 0.7]])
    expected = 0.0
    for a, b, sign in ((0, 0, 1), (1, 1, 1), (0, 1, -2)):
        expected += sign * shares[a] @ kernel(points[a], points[b]) @ shares[b]
    mean = 0.0
    draws = list(product(range(3), repeat=3))
    for one, other in product(draws, draws):
        probability = shares[0][list(one)].prod() * shares[1][list(other)].prod()
        x, y = (torch.from_numpy(points[side][list(draw)]) for side, draw in enumerate((one, other)))
        mean += probability * kernel_distance(x, y)[0]
    assert mean == pytest.approx(expected, rel=1e-9)


def test_the_mean_over_all_paired_samples_is_the_distance_of_the_distributions() -> None:
    """One distribution on three points, a function of it, and all samples of three images."""
    generator = np.random.default_rng(0)
    points = generator.normal(size=(2, 3, 2))
    shares = np.array([0.5, 0.3, 0.2])
    signs = ((0, 0, 1), (1, 1, 1), (0, 1, -2))
    expected = sum(sign * shares @ kernel(points[a], points[b]) @ shares for a, b, sign in signs)
    means = {True: 0.0, False: 0.0}
    for draw in product(range(3), repeat=3):
        x, y = (torch.from_numpy(points[side][list(draw)]) for side in (0, 1))
        for paired in means:
            means[paired] += shares[list(draw)].prod() * kernel_distance(x, y, paired=paired)[0]
    assert means[True] == pytest.approx(expected, rel=1e-9)
    assert abs(means[False] - expected) > 0.01


@pytest.mark.parametrize("count", [30, 37])
def test_paired_sides_that_are_equal_have_no_distance(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    monkeypatch.setattr(module, "SUBSET", 30)
    monkeypatch.setattr(module, "TILE", 16)
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    assert kernel_distance(x, x, paired=True) == (0, 0)


def test_paired_subsets_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUBSET", 10)
    monkeypatch.setattr(module, "TILE", 16)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 4, generator=generator)
    y = x + 0.5 * torch.randn(37, 4, generator=generator)
    values = []
    for column in indicators(37, 10, module.SUBSETS, 5, 0).T:
        a, b = (rows[column.bool()].double().numpy() for rows in (x, y))
        h = kernel(a, a) + kernel(b, b) - kernel(a, b) - kernel(b, a)
        values.append((h.sum() - h.trace()) / 90)
    assert kernel_distance(x, y, seed=5, paired=True) == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)


def test_subsets_are_those_of_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SUBSET", 10)
    monkeypatch.setattr(module, "TILE", 16)
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(37, 4, generator=generator), torch.randn(45, 4, generator=generator) + 0.5
    values = []
    chosen = [indicators(len(rows), 10, module.SUBSETS, 5, side) for side, rows in enumerate((x, y))]
    for subset in range(module.SUBSETS):
        a, b = (rows[one[:, subset].bool()].double().numpy() for rows, one in zip((x, y), chosen, strict=True))
        within = [(kernel(one, one).sum() - kernel(one, one).trace()) / 90 for one in (a, b)]
        values.append(sum(within) - 2 * kernel(a, b).mean())
    assert kernel_distance(x, y, seed=5) == pytest.approx((np.mean(values), np.std(values)), rel=1e-9)
    assert kernel_distance(x, y, seed=5) != kernel_distance(x, y, seed=6)


def test_subsets_are_drawn_without_replacement_and_do_not_repeat() -> None:
    chosen = indicators(20, 5, 50, 0, 0)
    assert (chosen.sum(0) == 5).all()
    assert len({tuple(column.tolist()) for column in chosen.T}) > 45
    assert not torch.equal(chosen, indicators(20, 5, 50, 0, 1))
    assert abs(chosen.mean(1) - 0.25).max() < 0.25


def test_all_images_are_one_subset() -> None:
    x = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))
    assert kernel_distance(x, x + 1)[1] == 0
    with pytest.raises(ValueError, match="at least two images"):
        kernel_distance(x[:1], x)
