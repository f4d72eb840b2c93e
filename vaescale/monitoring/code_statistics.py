"""Statistics of codebook use, from counts that are already summed over the ranks."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..interfaces import Codec, Usage
from .pictures import to_bytes

# A code is in use if its averaged share of the rows is at least this fraction of 1/K, the share under uniform use.
# Zheng, Vedaldi 2023, "Online clustered codebook" (CVQ-VAE), average and compare with 1/K in the same way. A hundredth
# is low enough for the tail of a Zipf law over 65 536 codes, whose last code has a twelfth of 1/K. A code that had a
# uniform share and is no longer used falls below it after 460 steps.
IN_USE = 0.01
SHOWN = 512  # codes of a codebook in its picture
CHUNK = 32  # images decoded at once


def perplexity(counts: Tensor) -> Tensor:
    """Returns exp of the entropy of the code frequencies, from 1 (one code) to K (uniform). counts: [K] → fp64 []."""
    return entropy(counts).exp2()


def entropy(counts: Tensor) -> Tensor:
    """Returns the entropy of the code frequencies in bits, in [0, log2 K]; 0 without counts. counts: [K] → fp64 []."""
    share = counts.double() / counts.sum().clamp(min=1e-30)
    return torch.special.entr(share).sum() / math.log(2)


def entropy_share(counts: Tensor) -> Tensor:
    """Returns the entropy divided by log2 K, in [0, 1]. counts: [K] → fp64 []."""
    return entropy(counts) / math.log2(len(counts))


def used(counts: Tensor) -> Tensor:
    """Returns the share of the codes with a positive count, in [0, 1]. counts: [K] → fp64 []."""
    return (counts > 0).double().mean()


def in_use(average: Tensor) -> Tensor:
    """Returns which codes have an averaged share of the rows of at least IN_USE / K. average: [K] → bool [K]."""
    average = average.double()
    return (average > 0) & (average * len(average) >= IN_USE * average.sum())


def usage_ema(average: Tensor) -> Tensor:
    """Returns the share of the codes that are `in_use`, in [0, 1]. average: [K] → fp64 []."""
    return in_use(average).double().mean()


def scalars(usage: Usage) -> dict[str, float]:
    """Returns the curves of one codebook by name. usage_…: share of the codes used since the last report (window),
    since the start (ever), and recently (ema). Perplexity and entropy, in bits per code and as a share of log2 K, are
    those since the last report. Ages are in steps, resets in codes per step."""
    values = {
        "usage_window": used(usage.window),
        "usage_ever": used(usage.ever),
        "usage_ema": usage_ema(usage.average),
        "perplexity": perplexity(usage.window),
        "entropy": entropy(usage.window),
        "entropy_share": entropy_share(usage.window),
        "age_mean": usage.age.double().mean(),
        "age_max": usage.age.max(),
        "resets_per_step": usage.resets / usage.steps.clamp(min=1),
    }
    return {name: float(value) for name, value in values.items()}


@torch.no_grad()
def decoded(codec: Codec, averages: list[Tensor], shapes: list[torch.Size]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields for each codebook, coarse to fine: (codes int64 [N], most used first; the image that each decodes to if it
    fills the map, uint8 [N, 3, H, W]).

    averages: [K] of each codebook; shapes: (h, w) of each codebook's map. The other codebooks are held at their most
    used code, or, after their own images are known, at the code in use nearest to grey, because black and white would
    hide what is added.
    """
    others = [average.argmax() for average in averages]
    for which, average in enumerate(averages):
        codes = most_used_first(average)
        tiles = []
        for part in codes.split(CHUNK):
            maps = [code.expand(len(part), *shape) for code, shape in zip(others, shapes, strict=True)]
            maps[which] = part[:, None, None].expand(-1, *shapes[which])
            tiles.append(to_bytes(codec.decode(maps)))
        pictures = torch.cat(tiles)
        far = (pictures.float() - 127.5).abs().mean(dim=(1, 2, 3))
        others[which] = codes[far.masked_fill(~in_use(average)[codes], math.inf).argmin()]
        yield codes, pictures


def most_used_first(average: Tensor) -> Tensor:
    """Returns the codes by decreasing use; if there are more than SHOWN, that many at even ranks. average: [K] →
    int64 [≤ SHOWN]."""
    order = average.argsort(descending=True, stable=True)
    places = torch.linspace(0, len(order) - 1, min(SHOWN, len(order)), dtype=torch.float64).round().long()
    return order[places.to(order.device)]
