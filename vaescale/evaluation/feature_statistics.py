"""What is kept of the features of a set of images: exact moments, evenly spaced rows, and sums over classes."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import distributed

KEPT = 10_000  # features kept of a set
SPLITS = 10  # of a set in sample order, for the inception score


@dataclass(frozen=True)
class Statistics:
    """Statistics of the features of N images, on the CPU. All ranks have the same ones."""

    count: int  # N; 0: not known
    mean: Tensor  # fp64 [D]
    covariance: Tensor  # fp64 [D, D], divided by N − 1
    rows: Tensor  # fp32 [min(N, KEPT), D], features of evenly spaced images in sample order; [0, D]: not known
    classes: Tensor | None = None  # fp64 [SPLITS, K + 2], see `class_sums`; None: the features have no logits

    @property
    def whole(self) -> bool:
        """Whether `rows` holds the features of all images."""
        return 0 < len(self.rows) == self.count


class Gatherer:
    """Gathers the Statistics of one set of images, batch by batch, over all ranks."""

    def __init__(self, count: int, dim: int, classes: int, device: torch.device) -> None:
        """count: N, images of all ranks together; dim: D, features of an image; classes: K, 0 without logits."""
        self.count = count
        self.kept = min(count, KEPT)
        zeros = partial(torch.zeros, dtype=torch.float64, device=device)
        self.sum, self.second = zeros(dim), zeros(dim, dim)
        self.rows = zeros(self.kept + 1, dim, dtype=torch.float32)  # the last one takes what is not kept
        self.classes = zeros(SPLITS, classes + 2) if classes else None

    def add(self, samples: Tensor, features: Tensor, logits: Tensor | None) -> None:
        """samples: int64 [B] in [0, N), each once over all ranks; features: fp32 [B, D]; logits: [B, K]."""
        double = features.double()
        self.sum += double.sum(0)
        self.second += double.T @ double
        self.rows.index_copy_(0, spaced(samples, self.count, self.kept), features)
        if self.classes is not None:
            assert logits is not None
            self.classes.index_add_(0, samples * SPLITS // self.count, class_sums(logits))

    def result(self) -> Statistics:
        """Collective."""
        total, second, rows = (distributed.sum_(one).cpu() for one in (self.sum, self.second, self.rows[: self.kept]))
        classes = None if self.classes is None else distributed.sum_(self.classes).cpu()
        if self.kept < self.count:
            mean = total / self.count
            covariance = torch.addr(second, total, mean, alpha=-1) / (self.count - 1)
        else:  # does not depend on the order of the sums
            mean = rows.double().mean(0)
            centred = rows.double() - mean
            covariance = centred.T @ centred / max(1, self.count - 1)
        return Statistics(self.count, mean, covariance, rows, classes)


def spaced(samples: Tensor, count: int, kept: int) -> Tensor:
    """Returns the places of samples among `kept` evenly spaced ones of `count`, int64 [B]; `kept` for all others.

    samples: int64 [B] in [0, count). Place k is that of sample k · count // kept."""
    place = (samples * kept + count - 1) // count
    return torch.where(place * count // kept == samples, place, kept)


def class_sums(logits: Tensor) -> Tensor:
    """Returns p(y|x), Σ_y p(y|x) log p(y|x) and 1 for each image, fp64 [B, K + 2], which can be added over images."""
    logs = logits.double().log_softmax(1)
    shares = logs.exp()
    return torch.cat([shares, (shares * logs).sum(1, keepdim=True), torch.ones_like(shares[:, :1])], dim=1)


def factor(known: Statistics) -> Tensor:
    """Returns A, fp64 [min(N, D), D] or [D, D], with Aᵀ A the covariance.

    From all rows it is the centred rows, or their triangular factor, divided by √(N − 1). So nothing is squared, and
    covariances that are singular because N ≤ D lose no digits. Otherwise it is √Λ Vᵀ of the covariance's eigenvalues
    and vectors. Eigenvalues below D · 2⁻⁵² times the largest one are rounding errors, and count as 0.
    """
    if known.whole:
        centred = (known.rows.double() - known.mean) / math.sqrt(max(1, known.count - 1))
        return torch.linalg.qr(centred, mode="r").R if len(centred) > centred.shape[1] else centred
    values, vectors = torch.linalg.eigh(known.covariance)
    least = len(values) * torch.finfo(torch.float64).eps * values[-1]
    return torch.where(values > least, values, 0).sqrt()[:, None] * vectors.T
