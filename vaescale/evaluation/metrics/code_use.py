"""How many codes of each codebook are used, and how evenly."""

import torch

from ...interfaces import Codebooks, Tensors
from ...monitoring import code_statistics
from .metric import Metric, Number, Seen


def sums(seen: Seen) -> Tensors:
    """Returns how often each code occurs, [K] for each codebook; {} for a codec without codebooks."""
    if not isinstance(seen.codec, Codebooks):
        return {}
    counts = {}
    for (name, usage), codes in zip(seen.codec.usage(clear=False).items(), seen.latents, strict=True):
        count = torch.zeros_like(usage.window)
        counts[name] = count.index_add_(0, codes.flatten(), torch.ones_like(codes.flatten()))
    return counts


def result(sums: Tensors, images: int) -> dict[str, float]:
    del images
    found = {}
    for name, count in sums.items():
        prefix = "" if len(sums) == 1 else f"{name}/"
        found[f"{prefix}usage"] = float(code_statistics.used(count))
        found[f"{prefix}perplexity"] = float(code_statistics.perplexity(count))
    return found


CODE_USE = Metric(
    numbers={
        "usage": Number("codes used", ".3f", "usage"),
        "perplexity": Number("perplexity", ".1f", "perplexity"),
    },
    protocol={
        "usage": "share of codes used at least once over all images",
        "perplexity": "exp of the entropy of the code frequencies over all images",
    },
    sums=sums,
    result=result,
)
