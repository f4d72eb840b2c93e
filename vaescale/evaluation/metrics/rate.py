"""How many bits a prior needs for a code, and how many are needed if every place has the same distribution."""

import math

import torch
from torch import Tensor

from ...interfaces import Codebooks, Condition, Prior, Tensors, WithPrior, by_level
from .metric import Metric, Number, Seen


def rate_sums(prior: Prior, codes: Tensor, condition: Condition, sample: Tensor) -> Tensors:
    """Returns sums over the images with these codes, int64 [B, L, h, w]: the bits of each place, fp64 [L, h, w], and
    how often each code of codebook i occurs, int64 [K_i]."""
    rates = prior.rates(codes, condition, sample).double().sum(0) / math.log(2)
    assert isinstance(prior.codec, Codebooks)
    counts: Tensors = {}
    for name, usage in prior.codec.usage(clear=False).items():
        level = codes[:, len(counts)].flatten()
        counts[name] = torch.zeros_like(usage.window).index_add_(0, level, torch.ones_like(level))
    return {"rates": rates, **counts}


def sums(seen: Seen) -> Tensors:
    """Returns the sums for a codec with a prior; {} for others."""
    if not isinstance(seen.codec, WithPrior):
        return {}
    batch = seen.batch
    return rate_sums(seen.codec.prior, torch.stack(seen.latents, dim=1), batch.condition, batch.sample)


def result(sums: Tensors, images: int) -> dict[str, float]:
    levels = sums["rates"].mean((1, 2)) / images
    counts = [count.double() for name, count in sums.items() if name != "rates"]
    entropies = [float(torch.special.entr(count / count.sum()).sum()) / math.log(2) for count in counts]
    found = {"bits_per_code": float(levels.mean()), "code_entropy": sum(entropies) / len(entropies)}
    if len(levels) > 1:
        found |= by_level("bits_per_code", levels.tolist())
        found |= by_level("code_entropy", entropies)
    return found


RATE = Metric(
    numbers={
        "bits_per_code": Number("rate of the prior (bits/code)", ".4f", "bits/code"),
        "bits_per_code_train": Number("the same over training images", ".4f", "on training images"),
        "code_entropy": Number("entropy of the code frequencies (bits/code)", ".4f", "entropy"),
    },
    protocol={
        "bits_per_code": "-log2 of the prior's probability of an image's codes, divided by their number; mean over "
        "images. Random order: of one order an image; masked: an unbiased estimate of the mean over orders (Uria et "
        "al. 2014), from one draw an image",
        "bits_per_code_train": "the same, of as many training images, only measured in training",
        "code_entropy": "of the code frequencies over all images and places, mean over codebooks: the rate of a prior "
        "for which all places are independent and alike",
    },
    sums=sums,
    result=result,
)
