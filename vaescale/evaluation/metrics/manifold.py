"""How much of each of two sets of images lies near the other one.

Precision and recall: Kynkäänniemi et al. 2019, "Improved precision and recall metric for assessing generative models",
equations 1 and 2. Density and coverage: Naeem et al. 2020, "Reliable fidelity and diversity metrics for generative
models", section 3.
"""

import torch
from torch import Tensor

from ..feature_statistics import KEPT
from .metric import Comparison, Number

PRECISION_K = 3  # neighbours whose distance is the radius around an image, for precision and recall
DENSITY_K = 5  # the same for density and coverage
ROWS, COLUMNS = 1024, 1024  # of the distances computed at once: 4 MiB, and as much for each copy


def manifold(reference: Tensor, other: Tensor) -> dict[str, float]:
    """Returns precision, recall, density and coverage of `other` [M, D] with respect to `reference` [N, D].

    Around each image lies a ball whose radius is the distance to its k-th nearest image of the same set. Precision is
    the share of `other` inside a ball of `reference`, recall the reverse. Density is the number of balls of `reference`
    around an image of `other`, divided by k, and coverage the share of balls of `reference` with an image of `other`.
    Raises ValueError for sets of at most k images.

    Distances are computed tile by tile, in fp32 of features around the mean of `reference`, which keeps more digits.
    """
    if min(len(reference), len(other)) <= DENSITY_K:
        raise ValueError(f"precision, recall, density and coverage need more than {DENSITY_K} images of each side")
    mean = reference.mean(0)
    near_reference, near_other = neighbour_distances(reference, mean), neighbour_distances(other, mean)
    precise = torch.zeros(len(other), dtype=torch.bool)
    recalled, covered = (torch.zeros(len(reference), dtype=torch.bool) for _ in range(2))
    around = 0
    for rows in tiles(len(reference), ROWS):
        for columns in tiles(len(other), COLUMNS):
            squares = squared_distances(reference[rows], other[columns], mean)
            precise[columns] |= (squares <= near_reference[rows, PRECISION_K - 1, None]).any(0)
            recalled[rows] |= (squares <= near_other[columns, PRECISION_K - 1]).any(1)
            inside = squares <= near_reference[rows, DENSITY_K - 1, None]
            around += int(inside.sum())
            covered[rows] |= inside.any(1)
    return {
        "precision": float(precise.double().mean()),
        "recall": float(recalled.double().mean()),
        "density": around / (DENSITY_K * len(other)),
        "coverage": float(covered.double().mean()),
    }


def neighbour_distances(x: Tensor, mean: Tensor) -> Tensor:
    """Returns the squared distances to the DENSITY_K nearest others of the same set, ascending: fp32 [N, DENSITY_K]."""
    found = []
    for rows in tiles(len(x), ROWS):
        best = x.new_full((len(x[rows]), DENSITY_K), torch.inf)
        for columns in tiles(len(x), COLUMNS):
            squares = squared_distances(x[rows], x[columns], mean)
            squares.diagonal(rows.start - columns.start).fill_(torch.inf)
            nearer = squares.topk(min(DENSITY_K, squares.shape[1]), largest=False).values
            best = torch.cat([best, nearer], dim=1).topk(DENSITY_K, largest=False).values
        found.append(best)
    return torch.cat(found)


def squared_distances(x: Tensor, y: Tensor, mean: Tensor) -> Tensor:
    """Returns fp32 [N, M], at least 0."""
    x, y = x - mean, y - mean
    squares = torch.addmm(y.square().sum(1)[None], x, y.T, alpha=-2)
    return squares.add_(x.square().sum(1, keepdim=True)).clamp_(min=0)


def tiles(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


MANIFOLD = Comparison(
    numbers={name: Number(name, ".4f", name) for name in ("precision", "recall", "density", "coverage")},
    protocol={
        "precision": f"Kynkaanniemi et al. 2019 with k = {PRECISION_K}; recall: the same",
        "density": f"Naeem et al. 2020 with k = {DENSITY_K}; coverage: the same; these four of at most {KEPT} evenly "
        "spaced images of each side",
    },
    result=lambda reference, other: manifold(reference.rows, other.rows),
    least=DENSITY_K + 1,
)
