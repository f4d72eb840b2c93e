"""What a codebook is used for, in numbers. Counts go in; they are already summed over ranks."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..interfaces import Codec, Usage
from .pictures import to_bytes

# A code is in use where its averaged share of the rows is at least this part of 1/K, the share that all would have
# alike. Zheng, Vedaldi 2023, "Online clustered codebook" (CVQ-VAE), average and compare to 1/K in the same way. A
# hundredth of it is low enough for the tail of a Zipf law of 65 536 codes, whose last code has a twelfth of 1/K; and a
# code that was used evenly and then no more falls below it after 460 steps.
IN_USE = 0.01
SHOWN = 512  # codes of a codebook in its picture
CHUNK = 32  # images decoded at once


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the code frequencies: between 1 (one code) and K (all alike). counts: [K] → fp64 []."""
    return entropy(counts).exp2()


def entropy(counts: Tensor) -> Tensor:
    """Entropy of the code frequencies in bits, between 0 and log2 K; 0 without counts. counts: [K] → fp64 []."""
    share = counts.double() / counts.sum().clamp(min=1e-30)
    return torch.special.entr(share).sum() / math.log(2)


def entropy_share(counts: Tensor) -> Tensor:
    """The entropy over log2 K, in [0, 1]. counts: [K] → fp64 []."""
    return entropy(counts) / math.log2(len(counts))


def used(counts: Tensor) -> Tensor:
    """Share of the codes with a count, in [0, 1]. counts: [K] → fp64 []."""
    return (counts > 0).double().mean()


def in_use(average: Tensor) -> Tensor:
    """Which codes have an averaged share of the rows of at least IN_USE / K. average: [K] → bool [K]."""
    average = average.double()
    return (average > 0) & (average * len(average) >= IN_USE * average.sum())


def usage_ema(average: Tensor) -> Tensor:
    """Share of the codes that are `in_use`, in [0, 1]. average: [K] → fp64 []."""
    return in_use(average).double().mean()


def scalars(usage: Usage) -> dict[str, float]:
    """usage_…: share of the codes used since the last report (window), since the start (ever), and about now (ema).
    perplexity and entropy, in bits a code and as a share of log2 K: since the last report. Ages in steps; resets in
    codes a step."""
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
    """Of each codebook, coarse to fine: (codes, most used first, int64 [N]; what each decodes to all over the map,
    uint8 [N, 3, H, W]).

    averages: [K] of each codebook; shapes: (h, w) of each codebook's map. The other codebooks stay at their most used
    code, or, where their pictures are known, at the one nearest to grey: black and white would hide what is added.
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
    """Codes by falling use; of more than SHOWN, so many evenly spread ones. average: [K] → int64 [≤ SHOWN]."""
    order = average.argsort(descending=True, stable=True)
    places = torch.linspace(0, len(order) - 1, min(SHOWN, len(order)), dtype=torch.float64).round().long()
    return order[places.to(order.device)]
