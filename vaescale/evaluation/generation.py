"""Generates numbered samples from the prior of a Codec, split over ranks.

Label and latents of sample i depend only on (seed, i). So any number of ranks and any batch size give the same images,
up to rounding in the decoder.
"""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ..interfaces import Codec, Condition
from ..nn.noise import mix
from .drawing import AT_ONCE, from_prior

# equal: i mod classes; random: all classes are equally likely; data: each is as likely as in the training set
Labels = Literal["equal", "random", "data"]
LABEL = 0x1AB  # purpose of the random number that decides a label


class Generated(NamedTuple):
    number: Tensor  # int64 [B], ascending
    label: Tensor  # int64 [B]; −1: the model has no classes
    x: Tensor  # uint8 [B, C, H, W]


def labels_of(number: Tensor, rule: Labels, class_counts: Sequence[int], seed: int) -> Tensor:
    """Returns the labels of the samples with these numbers, int64 [B]; −1 without classes.

    class_counts: the training images of each class. Only the rule "data" depends on their values.
    """
    classes = len(class_counts)
    if not classes:
        return torch.full_like(number, -1)
    if rule == "equal":
        return number % classes
    counts = torch.tensor(class_counts if rule == "data" else [1] * classes, device=number.device)
    ends = counts.cumsum(0)
    # The hash is uniform over 2⁶³ integers, so the remainder's bias is below 2⁻³³ for a billion images.
    place = (mix(seed, LABEL, number) & 2**63 - 1) % ends[-1]
    return torch.searchsorted(ends, place, right=True)


def generated(
    codec: Codec,
    count: int,
    labels: Labels = "equal",
    class_counts: Sequence[int] = (),
    seed: int = 0,
    temperature: float = 1.0,
    rank: int = 0,
    world: int = 1,
    batch: int = AT_ONCE,
    device: torch.device | None = None,
    attributes: int = 0,
) -> Iterator[Generated]:
    """Yields this rank's part of samples 0 … count − 1, in order, up to `batch` at a time: the means of p(x|z).

    class_counts: as in `labels_of`; empty for a model without classes. attributes: A, how many the model takes; none
    are given. Raises Unsupported if there is no prior.
    """
    last = (rank + 1) * count // world
    for start in range(rank * count // world, last, batch):
        number = torch.arange(start, min(start + batch, last), device=device)
        label = labels_of(number, labels, class_counts, seed)
        condition = Condition(label, torch.full((len(number), attributes), torch.nan, device=device))
        yield Generated(number, label, from_prior(codec, condition, seed, temperature, first=start))
