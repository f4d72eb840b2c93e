"""The guard's verdict in one CUDA kernel: the function of guard.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .guard import DEVIATIONS, LARGEST, MEMORY, NOT_FINITE, OVERFLOW, SPIKE, TAKEN


def judge(statistics: Tensor, norm: Tensor, excused: Tensor, least: float) -> tuple[Tensor, Tensor]:
    """Returns the record and the flags of a Verdict, and updates the statistics."""
    record = torch.empty_like(statistics)
    flags = torch.empty(3, dtype=torch.bool, device=norm.device)
    _judge[(1,)](statistics, norm, excused, record, flags, least, num_warps=1)
    return record, flags


@triton.jit
def _judge(statistics, norm, excused, record, flags, least):  # type: ignore[no-untyped-def]
    count, mean, variance = tl.load(statistics), tl.load(statistics + 1), tl.load(statistics + 2)
    run, share = tl.load(statistics + 3), tl.load(statistics + 4)
    value = tl.load(norm)
    above = tl.maximum(_DEVIATIONS * tl.sqrt(variance), least)
    limit = tl.where(count >= _MEMORY, tl.minimum(tl.exp(mean + above), _LARGEST), _LARGEST)
    taken = value <= limit  # false for NaN
    finite = value < float("inf")
    overflow = (tl.load(excused) != 0) & (finite == 0)
    enters = (value > 0) & taken
    usual = tl.where(count > 0, tl.exp(mean), float("nan"))
    count = tl.minimum(count + enters, _MEMORY)
    weight = tl.where(enters, 1 / tl.maximum(count, 1), 0.0)
    off = tl.where(enters, tl.log(value) - mean, 0.0)
    skipped = (taken == 0) & (overflow == 0)
    run = tl.where(taken, 0.0, run + skipped)
    share = tl.where(overflow, share, share + (skipped - share) / _MEMORY)
    why = tl.where(overflow, _OVERFLOW, tl.where(finite, _SPIKE, _NOT_FINITE))
    tl.store(statistics, count)
    tl.store(statistics + 1, mean + weight * off)
    tl.store(statistics + 2, (1 - weight) * (variance + weight * off * off))
    tl.store(statistics + 3, run)
    tl.store(statistics + 4, share)
    tl.store(record, tl.where(taken, _TAKEN, why).to(tl.float32))
    tl.store(record + 1, value)
    tl.store(record + 2, usual)
    tl.store(record + 3, run)
    tl.store(record + 4, share)
    tl.store(flags, taken == 0)
    tl.store(flags + 1, overflow)
    tl.store(flags + 2, (taken == 0) & ((overflow == 0) | (count >= _MEMORY)))


_DEVIATIONS, _LARGEST, _MEMORY = tl.constexpr(float(DEVIATIONS)), tl.constexpr(LARGEST), tl.constexpr(float(MEMORY))
_TAKEN, _NOT_FINITE, _SPIKE, _OVERFLOW = map(tl.constexpr, (TAKEN, NOT_FINITE, SPIKE, OVERFLOW))
