"""PCA against scikit-learn's, and its Gaussian against the formula of a multivariate normal."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA as Reference

from vaescale.interfaces import Batch, Condition, Shape
from vaescale.models.pca import PCA, Config

LEVELS = 255


def batch(x: torch.Tensor) -> Batch:
    count = len(x)
    return Batch(x, torch.zeros(count, dtype=torch.int64), torch.zeros(count, 0), torch.arange(count))


def digits() -> torch.Tensor:
    """uint8 [1797, 1, 8, 8]"""
    return torch.from_numpy(np.rint(load_digits().images * (LEVELS / 16)).astype(np.uint8))[:, None]


def textures() -> torch.Tensor:
    """uint8 [200, 3, 8, 8], neighbours being alike, so that no two eigenvalues are."""
    noise = torch.rand(200, 3, 10, 10, generator=torch.Generator().manual_seed(0))
    return (255 * noise.unfold(2, 3, 1).unfold(3, 3, 1).mean((-1, -2))).to(torch.uint8)


def fitted(x: torch.Tensor, dim: int, patch: int = 0) -> PCA:
    model = PCA(Config(latent_dim=dim, patch=patch), Shape(x.shape[1], x.shape[2]))
    moments = model.moments()
    for part in x.split(100):
        model.count(moments, batch(part), torch.ones(len(part), dtype=torch.bool))
    model.solve(moments.over_ranks())
    return model


def equal(model: PCA, rows: NDArray[np.float64]) -> Reference:
    """rows: fp64 [N, D] in [0, 1]. The model's are fp32 copies of fp64 numbers: they differ by their rounding, 6e-8."""
    reference = Reference(model.config.latent_dim, svd_solver="full").fit(rows)
    np.testing.assert_allclose(model.mean, reference.mean_, atol=1e-6)
    signs = np.sign((model.components.numpy() * reference.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(model.components, signs * reference.components_, atol=1e-6)
    np.testing.assert_allclose(model.variance, reference.explained_variance_, rtol=1e-6)
    # Of fewer rows than dimensions the other eigenvalues are zero; scikit-learn leaves them out of the mean,
    # Tipping and Bishop (equation 8) do not.
    (count, size), dim = rows.shape, model.config.latent_dim
    noise = reference.noise_variance_ * (min(count, size) - dim) / (size - dim)
    np.testing.assert_allclose(model.noise, noise, rtol=1e-6)
    np.testing.assert_allclose(model.explained(), reference.explained_variance_ratio_.sum(), rtol=1e-6)
    return reference


def test_it_is_scikit_learns() -> None:
    x = digits()
    rows = x.flatten(1).double().numpy() / LEVELS
    model = fitted(x, 10)
    reference = equal(model, rows)
    (u,) = model.encode(batch(x))
    y = model.decode([u])
    signs = np.sign((model.components.numpy() * reference.components_).sum(1))
    np.testing.assert_allclose(u, reference.transform(rows) * signs, atol=3e-6)
    np.testing.assert_allclose(y.flatten(1), reference.inverse_transform(reference.transform(rows)), atol=3e-6)


@pytest.mark.parametrize("patch", [2, 4, 8])
def test_that_of_patches_is_scikit_learns_on_patches(patch: int) -> None:
    x = textures()
    patches = [
        x[:, :, top : top + patch, left : left + patch] for top in range(0, 8, patch) for left in range(0, 8, patch)
    ]
    model = fitted(x, 5, patch)
    equal(model, torch.cat(patches).flatten(1).double().numpy() / LEVELS)
    (u,) = model.encode(batch(x))
    assert u.shape == (200, 5, 8 // patch, 8 // patch)
    corner = (patches[0].flatten(1) / 255 - model.mean) @ model.components.T
    torch.testing.assert_close(u[:, :, 0, 0], corner, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(
        model.decode([u])[:, :, -patch:, -patch:].flatten(1), (model.mean + u[:, :, -1, -1] @ model.components)
    )


def test_noise_of_fewer_rows_than_subpixels_is_that_of_equation_8() -> None:
    """The likeliest one: neither a little more nor less makes the rows more probable. scikit-learn's is another."""
    x = textures()[:60]
    rows = x.flatten(1).double().numpy() / LEVELS
    model = fitted(x, 10)
    values = np.linalg.eigvalsh(np.cov(rows.T))[::-1]
    np.testing.assert_allclose(model.noise, values[10:].sum() / (192 - 10), rtol=1e-5)
    reference = Reference(10, svd_solver="full").fit(rows)
    np.testing.assert_allclose(model.noise * (192 - 10) / (60 - 10), reference.noise_variance_, rtol=1e-5)

    def log_density(noise: float) -> float:
        kept = values[:10]
        return -((np.log(kept) + 1).sum() + (192 - 10) * np.log(noise) + values[10:].sum() / noise) / 2

    best = log_density(float(model.noise))
    assert all(log_density(float(model.noise) * factor) < best for factor in (0.9, 1.1))
    assert log_density(reference.noise_variance_) < best


def test_the_loss_is_what_the_left_out_components_hold() -> None:
    x = textures()
    model = fitted(x, 20)
    left_out = model.noise * (192 - 20) * (199 / 200)  # the variances have n − 1 below, the loss has n
    torch.testing.assert_close(model(batch(x), 0).loss * 192, left_out, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("dim", "patch"), [(6, 0), (6, 4), (190, 0)])
def test_the_bound_is_the_density_of_the_dequantised_image_at_every_draw(dim: int, patch: int) -> None:
    """E log N(x + u; μ, V(Λ − σ²)Vᵀ + (σ² + δ²/12)I) over u uniform in bins of δ = 1/255, times the bin's volume; where
    z, not the image, is known: E over u of the quadratic form is δ²/12 of the noise's precision a subpixel."""
    x = textures()
    model = fitted(x, dim, patch)
    side = patch or 8
    v, variance, noise = model.components.double().numpy(), model.variance.double().numpy(), float(model.noise)
    dequantised, bin_ = noise + 1 / 255**2 / 12, 1 / 255
    matrix = v.T @ np.diag(variance - noise) @ v + dequantised * np.eye(v.shape[1])
    rows = x.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    centred = rows.double().numpy() / LEVELS - model.mean.double().numpy()
    form = np.einsum("bnd,de,bne->b", centred, np.linalg.inv(matrix), centred)
    count = rows.shape[1]
    log_density = -(form + count * (np.linalg.slogdet(matrix)[1] + v.shape[1] * np.log(2 * np.pi))) / 2
    expected = log_density + 192 * (np.log(bin_) - bin_**2 / 12 / (2 * dequantised))
    for draw in range(2):
        bound = model.bound(batch(x), draw)
        assert bound.rate.shape == (1, 200)
        np.testing.assert_allclose(bound.log_ratio - bound.distortion, expected, rtol=1e-5, atol=1e-2)


def test_the_rate_is_the_mean_of_its_draws() -> None:
    model, x = fitted(textures(), 6), textures()[:1].expand(20_000, -1, -1, -1)
    bound = model.bound(batch(x))
    deviation = bound.log_ratio.std() / len(x) ** 0.5
    assert abs(float(bound.rate.mean() + bound.log_ratio.mean())) < 5 * deviation


def test_samples_have_the_covariance_of_the_data() -> None:
    """In the m directions that are modelled, and with the noise of a draw in all others."""
    model = fitted(textures(), 6)
    torch.manual_seed(0)
    condition = Condition(torch.zeros(50_000, dtype=torch.int64), torch.zeros(50_000, 0))
    mean, drawn = model.decode([], condition), model.decode([], condition, draw=True)
    scores = (mean.flatten(1) - model.mean) @ model.components.T
    torch.testing.assert_close(scores.var(0), model.variance - model.noise, rtol=0.03, atol=0)
    off = drawn.flatten(1) - model.mean
    scores = off @ model.components.T
    torch.testing.assert_close(scores.var(0), model.variance, rtol=0.03, atol=0)
    torch.testing.assert_close(
        (off - scores @ model.components).square().sum(1).mean(), 186 * model.noise, rtol=0.03, atol=0
    )
    with pytest.raises(ValueError, match="how many images"):
        model.decode([])
    half = model.decode([], condition, temperature=0.5)
    torch.testing.assert_close(half.var(0).sum(), mean.var(0).sum() / 4, rtol=0.03, atol=0)


def test_a_draw_around_the_scores_has_the_posteriors_variance() -> None:
    model, x = fitted(textures(), 6), textures()[:1].expand(20_000, -1, -1, -1)
    torch.manual_seed(0)
    (u,) = model.encode(batch(x), temperature=2.0)
    torch.testing.assert_close(u.mean(0), model.encode(batch(x[:1]))[0][0], rtol=0, atol=0.02)
    dequantised = model.noise + 1 / 255**2 / 12
    prior = model.variance - model.noise
    torch.testing.assert_close(u.var(0), 4 / (1 / dequantised + 1 / prior), rtol=0.05, atol=0)


def test_components_without_variance_are_no_nan() -> None:
    """Two images span one direction; three are asked for."""
    x = textures()[:2]
    model = fitted(x, 3)
    assert all(bool(value.isfinite().all()) for value in model.bound(batch(x)))
    torch.testing.assert_close(model(batch(x), 0).reconstruction, x / 255, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("config", "shape", "sentence"),
    [
        (Config(), Shape(3, 128), r"a PCA of 49152 subpixels needs a covariance of 18\.0 GiB.*set model\.patch"),
        (Config(patch=3), Shape(1, 8), r"model\.patch=3 does not divide data\.size=8"),
        (Config(latent_dim=64), Shape(1, 8), r"model\.latent_dim=64 must lie between 1 and 63"),
    ],
)
def test_what_cannot_be_is_one_sentence(config: Config, shape: Shape, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        PCA(config, shape)


def test_its_basis_is_a_picture() -> None:
    basis = fitted(digits(), 4).basis()
    assert basis.shape == (5, 1, 8, 8)
    assert float(basis.min()) >= 0
    torch.testing.assert_close(basis[0], digits().float().mean(0) / 255)
    torch.testing.assert_close((basis[1:] - 0.5).abs().amax((1, 2, 3)), torch.full((4,), 0.5))
