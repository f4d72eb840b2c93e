"""Random numbers for training that depend only on the seed and the sample number g.

They do not depend on ranks, micro-batches or earlier draws. So a step at any world size draws what one process draws on
the joined batch, and a resumed run draws what the uninterrupted run would have drawn.
"""

import math

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as int64; products wrap around
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def uniform(sample: Tensor, size: tuple[int, ...], *keys: int) -> Tensor:
    """Return uniform numbers in (0, 1), fp64 [B, *size], for sample numbers int64 [B]. Different keys (a seed, a
    purpose) give independent numbers."""
    place = torch.arange(math.prod(size), device=sample.device)
    words = mix(*keys, sample[:, None], place)
    return ((_shifted(words, 11).double() + 0.5) * 2.0**-53).view(len(sample), *size)


def normal(sample: Tensor, size: tuple[int, ...], *keys: int) -> Tensor:
    """Return numbers from N(0, 1), fp32 [B, *size], for sample numbers int64 [B]."""
    return torch.special.ndtri(uniform(sample, size, *keys)).float()


def mix(*keys: int | Tensor) -> Tensor:
    """Return one 64-bit hash, as int64, per element of the broadcast keys: `data.order.mix` on the device."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = (state + key + 1) * _GAMMA
        state = (state ^ _shifted(state, 30)) * _FIRST
        state = (state ^ _shifted(state, 27)) * _SECOND
        state = state ^ _shifted(state, 31)
    return state


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; `>>` alone would fill in copies of the sign bit."""
    return (words >> bits) & ((1 << (64 - bits)) - 1)
