import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from tests.evaluation.test_feature_statistics import gathered
from vaescale.evaluation import feature_statistics
from vaescale.evaluation.feature_statistics import Statistics
from vaescale.evaluation.metrics.frechet import frechet


def rows(count: int, dim: int, seed: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
    """Correlated rows, whose covariance has eigenvalues over two decades."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.randn(dim, dim, generator=generator) * torch.logspace(0, -1, dim)
    return scale * torch.randn(count, dim, generator=generator) @ basis + shift


def with_sqrtm(x: torch.Tensor, y: torch.Tensor) -> float:
    a, b = (np.cov(one.double().numpy().T) for one in (x, y))
    means = x.double().mean(0) - y.double().mean(0)
    return float(means.square().sum()) + np.trace(a) + np.trace(b) - 2 * np.trace(sqrtm(a @ b)).real


@pytest.mark.parametrize("kept", [10_000, 64], ids=["rows", "moments"])
def test_the_distance_is_that_of_a_matrix_root(monkeypatch: pytest.MonkeyPatch, kept: int) -> None:
    monkeypatch.setattr(feature_statistics, "KEPT", kept)
    x, y = rows(400, 24, 0), rows(500, 24, 1, 1.3, 0.2)
    assert frechet(gathered(x), gathered(y)) == pytest.approx(with_sqrtm(x, y), rel=1e-9)


@pytest.mark.parametrize("kept", [(10_000, 10_000), (10_000, 4), (4, 10_000)])
def test_fewer_images_than_features(monkeypatch: pytest.MonkeyPatch, kept: tuple[int, int]) -> None:
    """From all rows, from moments, and from one of each."""
    x, y = rows(12, 64, 0), rows(200, 64, 1)
    found = []
    for one, most in zip((x, y), kept, strict=True):
        monkeypatch.setattr(feature_statistics, "KEPT", most)
        found.append(gathered(one))
    centred = (x.double() - x.double().mean(0)).numpy() / np.sqrt(11)
    b = np.cov(y.double().numpy().T)
    # The nonzero eigenvalues of Σx Σy are those of X Σy Xᵀ, of which N − 1 are not 0.
    cross = np.sqrt(np.linalg.eigvalsh(centred @ b @ centred.T)[1:]).sum()
    means = float((x.double().mean(0) - y.double().mean(0)).square().sum())
    expected = means + np.trace(centred @ centred.T) + np.trace(b) - 2 * cross
    assert frechet(*found) == pytest.approx(expected, rel=1e-6)
    assert frechet(found[1], found[0]) == pytest.approx(expected, rel=1e-6)


def test_two_gaussians_have_a_closed_form() -> None:
    """Covariances that commute: Σ (μ₁ − μ₂)² + (σ₁ − σ₂)² along the common axes."""
    generator = torch.Generator().manual_seed(0)
    axes, _ = torch.linalg.qr(torch.randn(16, 16, generator=generator, dtype=torch.float64))
    means, deviations = (torch.rand(2, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    known = [
        Statistics(100, mean, axes @ deviation.square().diag() @ axes.T, torch.zeros(0, 16))
        for mean, deviation in zip(means, deviations, strict=True)
    ]
    expected = (means[0] - means[1]).square().sum() + (deviations[0] - deviations[1]).square().sum()
    assert frechet(*known) == pytest.approx(float(expected), rel=1e-9)


@pytest.mark.parametrize(("count", "kept"), [(500, 10_000), (10, 10_000), (500, 64), (10, 4)])
def test_a_set_has_no_distance_to_itself(monkeypatch: pytest.MonkeyPatch, count: int, kept: int) -> None:
    monkeypatch.setattr(feature_statistics, "KEPT", kept)
    known = gathered(rows(count, 48, 0, shift=3))
    assert 0 <= frechet(known, known) < 1e-10
