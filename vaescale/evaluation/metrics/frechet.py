"""The Fréchet distance of two sets of images.

Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation 6; of
Gaussians: Dowson and Landau 1982, "The Fréchet distance between multivariate normal distributions".
"""

import torch

from ..feature_statistics import KEPT, Statistics, factor
from .metric import Comparison, Number


def frechet(reference: Statistics, other: Statistics) -> float:
    """Returns ‖μ₁ − μ₂‖² + tr(Σ₁ + Σ₂ − 2 (Σ₁ Σ₂)^½), at least 0.

    With Σ₁ = Aᵀ A and Σ₂ = Bᵀ B the eigenvalues of Σ₁ Σ₂ are the squared singular values of A Bᵀ, so that
    tr (Σ₁ Σ₂)^½ = ‖A Bᵀ‖_*, the sum of the singular values. Unlike a root of the matrix Σ₁ Σ₂, which is not symmetric,
    it is real and needs neither full rank nor a constant on the diagonal. The sum above can still fall below 0 by
    rounding, about 10⁻¹⁵ of the traces. Then the result is 0.
    """
    a, b = factor(reference), factor(other)
    cross = torch.linalg.svdvals(a @ b.T).sum()
    means = (reference.mean - other.mean).square().sum()
    return max(0.0, float(means + a.square().sum() + b.square().sum() - 2 * cross))


FRECHET = Comparison(
    numbers={"fd": Number("FD", ".3f", "FD")},
    protocol={
        "fd": "Frechet distance of Gaussians with the features' means and unbiased covariances, in float64 "
        f"(Heusel et al. 2017, equation 6), from the rows of up to {KEPT} images, from moments for more; called FID "
        "with the published Inception features only",
    },
    result=lambda reference, other: {"fd": frechet(reference, other)},
    least=2,
    rows=False,
)
