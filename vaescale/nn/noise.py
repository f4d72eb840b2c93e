"""Random numbers for training that only the seed and the sample number g decide.

Ranks, micro-batches and what a process has drawn before do not occur in them: one step at any world size draws what
one process draws on the joined batch, and a resumed run draws what it would have drawn.
"""

import math

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as int64, whose products wrap around
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def uniform(sample: Tensor, size: tuple[int, ...], *keys: int) -> Tensor:
    """sample: int64 [B] → fp64 [B, *size] in (0, 1); different keys (a seed, a purpose) give independent numbers."""
    place = torch.arange(math.prod(size), device=sample.device)
    words = mix(*keys, sample[:, None], place)
    return ((_shifted(words, 11).double() + 0.5) * 2.0**-53).view(len(sample), *size)


def normal(sample: Tensor, size: tuple[int, ...], *keys: int) -> Tensor:
    """sample: int64 [B] → fp32 [B, *size] from N(0, 1)."""
    return torch.special.ndtri(uniform(sample, size, *keys)).float()


def mix(*keys: int | Tensor) -> Tensor:
    """`data.order.mix` on the device: one 64-bit hash, as int64, per element of the broadcast keys."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = (state + key + 1) * _GAMMA
        state = (state ^ _shifted(state, 30)) * _FIRST
        state = (state ^ _shifted(state, 27)) * _SECOND
        state = state ^ _shifted(state, 31)
    return state


def _shifted(words: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in from the left: `>>` alone would bring in the sign."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
