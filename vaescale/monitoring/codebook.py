"""What a codebook is used for, in numbers. Counts go in; they are already summed over ranks."""

import torch
from torch import Tensor

from ..interfaces import Usage


def perplexity(counts: Tensor) -> Tensor:
    """exp of the entropy of the code frequencies: between 1 (one code) and K (all alike). counts: [K] → fp64 []."""
    share = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(share).sum().exp()


def used(counts: Tensor) -> Tensor:
    """Share of the codes with a count, in [0, 1]. counts: [K] → fp64 []."""
    return (counts > 0).double().mean()


def scalars(usage: Usage) -> dict[str, float]:
    """usage_window and perplexity: since the last report; usage_ever: since the start; ages in steps."""
    values = {
        "usage_window": used(usage.window),
        "usage_ever": used(usage.ever),
        "perplexity": perplexity(usage.window),
        "age_mean": usage.age.double().mean(),
        "age_max": usage.age.max(),
        "resets": usage.resets,
    }
    return {name: float(value) for name, value in values.items()}
