"""The kernel distance (KID) of two sets of images: Bińkowski, Sutherland, Arbel, Gretton 2018, "Demystifying MMD GANs",
section 4. Of images and their own reconstructions: Gretton, Borgwardt, Rasch, Schölkopf, Smola 2012, "A kernel
two-sample test", section 2.2."""

from dataclasses import replace

import torch
from torch import Tensor

from ...data.order import permutation
from ..feature_statistics import KEPT, Statistics
from .metric import Comparison, Number

SUBSETS = 100
SUBSET = 1000  # images
TILE = 1024  # rows and columns of the kernel computed at once


def kernel_distance(x: Tensor, y: Tensor, seed: int = 0, paired: bool = False) -> tuple[float, float]:
    """Returns the mean and the standard deviation over SUBSETS of the unbiased squared maximum mean discrepancy
    with the kernel k(x, y) = (xᵀ y / D + 1)³. x [N, D], y [M, D]; each subset has m = min(SUBSET, N, M)
    images of each side. The seed alone chooses them. If a subset is all of both sides, there is one, and no deviation.
    Raises ValueError for fewer than two images.

    paired: row i of both sides is of the same image, so the two depend on each other. Then a subset has the same
    images on both sides, and the pairs i = j count nowhere: the estimate is the U-statistic of (x_i, y_i), without bias
    for dependent sides, too (Gretton et al. 2012, equation 4). It is 0 if the sides are equal.

    The kernel of all pairs is computed once, tile by tile: the sum over the pairs of a subset is vᵀ K w with the
    indicators v, w of its images.
    """
    size = min(SUBSET, len(x), len(y))
    if size < 2:
        raise ValueError("the kernel distance needs at least two images of each side")
    subsets = 1 if size == len(x) == len(y) else SUBSETS
    v = indicators(len(x), size, subsets, seed, 0)
    w = v if paired else indicators(len(y), size, subsets, seed, 1)
    pairs = size * (size - 1)
    within = (kernel_sums(x, x, v, v, same=True) + kernel_sums(y, y, w, w, same=True)) / pairs
    values = within - 2 * kernel_sums(x, y, v, w, same=paired) / (pairs if paired else size**2)
    return float(values.mean()), float(values.std(correction=0))


def indicators(count: int, size: int, subsets: int, *keys: int) -> Tensor:
    """Returns fp64 [count, subsets] with `size` ones in each column."""
    chosen = torch.zeros(count, subsets, dtype=torch.float64)
    for subset in range(subsets):
        chosen[torch.from_numpy(permutation(count, *keys, subset)[:size]), subset] = 1
    return chosen


def kernel_sums(x: Tensor, y: Tensor, v: Tensor, w: Tensor, same: bool = False) -> Tensor:
    """Returns Σ_ij v_is k(x_i, y_j) w_js for each subset s, fp64 [S]; `same`: without the pairs i = j."""
    total = v.new_zeros(v.shape[1])
    for first in range(0, len(x), TILE):
        rows = x[first : first + TILE].double() / x.shape[1]
        for second in range(0, len(y), TILE):
            k = (rows @ y[second : second + TILE].double().T + 1) ** 3
            if same and first == second:
                k.fill_diagonal_(0)
            total += (v[first : first + TILE] * (k @ w[second : second + TILE])).sum(0)
    return total


def result(reference: Statistics, other: Statistics) -> dict[str, float]:
    mean, deviation = kernel_distance(reference.rows, other.rows)
    return {"kid": mean, "kid_std": deviation}


def paired_result(reference: Statistics, other: Statistics) -> dict[str, float]:
    mean, deviation = kernel_distance(reference.rows, other.rows, paired=True)
    return {"kid": mean, "kid_std": deviation}


KERNEL_DISTANCE = Comparison(
    numbers={
        "kid": Number("KID", ".5f", "KID"),
        "kid_std": Number("KID, standard deviation over subsets", ".5f"),
    },
    protocol={
        "kid": f"unbiased squared MMD with the kernel (x.y / D + 1)^3 (Binkowski et al. 2018), mean over {SUBSETS} "
        f"subsets of {SUBSET} images (fewer if there are fewer; all at once if a subset is everything) of at most "
        f"{KEPT} evenly spaced ones, chosen by a fixed seed; reconstructions: of the same images as on the other side, "
        "without the pairs of an image and its own reconstruction (Gretton et al. 2012, equation 4); kid_std: standard "
        "deviation over subsets",
    },
    result=result,
    least=2,
)
PAIRED_KERNEL_DISTANCE = replace(KERNEL_DISTANCE, result=paired_result)  # row i of both sides is of the same image
