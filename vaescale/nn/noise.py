"""Random numbers for training that depend only on the seed and the sample number g.

They do not depend on ranks, micro-batches or earlier draws. So a step at any world size draws what one process draws on
the joined batch, and a resumed run draws what the uninterrupted run would have drawn.

Each number is a function of a 64-bit hash of (keys, g, place). On CUDA one kernel computes all numbers of a call of
`normal`; on other devices the same function is computed with the operations of torch.
"""

import math

import torch
from torch import Tensor

from ..numerics import TRITON

VERSION = 2  # of `normal`; version 1 inverted the distribution function in fp64

_GAMMA = 0x9E3779B97F4A7C15
_FIRST = 0xBF58476D1CE4E5B9
_SECOND = 0x94D049BB133111EB
_WORD = 2**64 - 1


def uniform(sample: Tensor, size: tuple[int, ...], *keys: int) -> Tensor:
    """Returns uniform numbers in (0, 1), fp64 [B, *size], for sample numbers int64 [B]. Different keys (a seed, a
    purpose) give independent numbers."""
    place = torch.arange(math.prod(size), device=sample.device)
    words = mix(*keys, sample[:, None], place)
    return (_shifted(words, 11).double().add_(0.5).mul_(2.0**-53)).view(len(sample), *size)


def spread(sample: Tensor, *keys: int) -> Tensor:
    """Returns uniform numbers in (0, 1), fp64 [B], of which those of consecutive sample numbers are spread evenly:
    multiples of the golden ratio, modulo 1, from a place that the keys decide."""
    words = sample * _signed(_GAMMA) + _mixed(*keys)  # _GAMMA is 2^64 divided by the golden ratio
    return _shifted(words, 11).double().add_(0.5).mul_(2.0**-53)


def normal(sample: Tensor, size: tuple[int, ...], *keys: int, version: int | None = None) -> Tensor:
    """Returns numbers from N(0, 1), fp32 [B, *size], for sample numbers int64 [B].

    The two halves of a word's hash give two numbers (Box, Muller 1958, "A note on the generation of random normal
    deviates"), which lie half a sample apart. The largest possible number is 6.8; one in 10¹¹ would be larger.
    version: 1 gives the numbers of runs that were begun before version 2; None: the newest.
    """
    if version == 1:
        return torch.special.ndtri(uniform(sample, size, *keys)).float()
    return _normal(sample, math.prod(size), _mixed(*keys)).view(len(sample), *size)


def kept(sample: Tensor, size: tuple[int, ...], dropped: float, *keys: int) -> Tensor:
    """Returns which numbers dropout keeps, bool [B, *size]: all but a share `dropped` of them, rounded to 16 bits.

    Each word gives four numbers, so that the cost is that of torch's own dropout.
    """
    count, least = math.prod(size), round(dropped * 2**16) - 2**15
    return _kept(sample, count, _mixed(*keys), least).view(len(sample), *size)


@torch.library.custom_op("vaescale::kept", mutates_args=())
def _kept(sample: Tensor, count: int, state: int, least: int) -> Tensor:
    """Returns whether 16 bits of the hash, as int16, are at least `least`: bool [B, count]."""
    if sample.is_cuda and TRITON:
        from .noise_triton import kept as kernel

        return kernel(sample, count, state, least)
    place = torch.arange(-(-count // 4), device=sample.device)
    words = _mix_in(_mix_in(torch.full_like(sample, state), sample)[:, None], place)
    return words.view(torch.int16)[:, :count] >= least


@_kept.register_fake
def _(sample: Tensor, count: int, state: int, least: int) -> Tensor:
    del state, least
    return torch.empty(len(sample), count, dtype=torch.bool, device=sample.device)


@torch.library.custom_op("vaescale::normal", mutates_args=())  # one operation for torch.compile and for profilers
def _normal(sample: Tensor, count: int, state: int) -> Tensor:
    """Returns fp32 [B, count]. state: the hash of the keys."""
    if sample.is_cuda and TRITON:
        from .noise_triton import normal as kernel  # imported late: it takes a second and is rarely needed

        return kernel(sample, count, state)
    pairs = -(-count // 2)
    place = torch.arange(pairs, device=sample.device)
    words = _mix_in(_mix_in(torch.full_like(sample, state), sample)[:, None], place)
    radius = _shifted(words, 32).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
    angle = words.bitwise_and_(2**32 - 1).float().mul_(2 * math.pi * 2.0**-32)
    numbers = radius.new_empty(len(sample), 2 * pairs)
    torch.mul(radius, angle.cos(), out=numbers[:, :pairs])
    torch.mul(radius, angle.sin_(), out=numbers[:, pairs:])
    return numbers[:, :count].contiguous()


@_normal.register_fake
def _(sample: Tensor, count: int, state: int) -> Tensor:
    del state
    return torch.empty(len(sample), count, device=sample.device)


def mix(*keys: int | Tensor) -> Tensor:
    """Returns one 64-bit hash, as int64, per element of the broadcast keys: `data.order.mix` on the device."""
    state = torch.zeros((), dtype=torch.int64)
    for key in keys:
        state = _mix_in(state, key)
    return state


def _mix_in(state: Tensor, key: int | Tensor) -> Tensor:
    """Returns the hash of (what `state` is the hash of, key), broadcast. SplitMix64 (Steele, Lea, Flood 2014, "Fast
    splittable pseudorandom number generators")."""
    state = (state + key).add_(1).mul_(_signed(_GAMMA))
    state = state.bitwise_xor_(_shifted(state, 30)).mul_(_signed(_FIRST))
    state = state.bitwise_xor_(_shifted(state, 27)).mul_(_signed(_SECOND))
    return state.bitwise_xor_(_shifted(state, 31))


def _mixed(*keys: int) -> int:
    """`mix` of Python integers."""
    state = 0
    for key in keys:
        state = (state + key + 1) * _GAMMA & _WORD
        state = (state ^ state >> 30) * _FIRST & _WORD
        state = (state ^ state >> 27) * _SECOND & _WORD
        state ^= state >> 31
    return _signed(state)


def _signed(word: int) -> int:
    """Returns a 64-bit word as int64, whose products wrap around."""
    return word - 2**64 if word >= 2**63 else word


def _shifted(words: Tensor, bits: int) -> Tensor:
    """Logical shift to the right; `>>` alone would fill in copies of the sign bit."""
    return (words >> bits).bitwise_and_((1 << (64 - bits)) - 1)
