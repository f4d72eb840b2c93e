"""Normal numbers, and the choice of dropout, in one CUDA kernel each: the functions of noise.py."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 1024  # per program; not timed on a GPU
NUMBERS = 1024


def normal(sample: Tensor, count: int, state: int) -> Tensor:
    """Returns fp32 [B, count] from N(0, 1). sample: int64 [B]; state: the hash of the keys, as int64."""
    numbers = torch.empty(len(sample), count, device=sample.device)
    if numbers.numel():
        pairs = triton.cdiv(count, 2)
        grid = (len(sample), triton.cdiv(pairs, PAIRS))  # CUDA limits the second to 65,535
        _normal[grid](sample.contiguous(), numbers, state, count, pairs, PAIRS)
    return numbers


@triton.jit
def _normal(sample, numbers, state, count, pairs, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    words = _mix_in(_mix_in(state.to(tl.uint64), tl.load(sample + row)), place)
    radius = tl.sqrt(-2.0 * tl.log(((words >> 32).to(tl.float32) + 0.5) * (2.0**-32)))
    angle = (words & 0xFFFFFFFF).to(tl.float32) * (2.0 * 3.141592653589793 * 2.0**-32)
    here = numbers + row * count + place
    tl.store(here, radius * tl.cos(angle), mask=place < pairs)
    tl.store(here + pairs, radius * tl.sin(angle), mask=place + pairs < count)


def kept(sample: Tensor, count: int, state: int, least: int) -> Tensor:
    """Returns bool [B, count]: whether 16 bits of the hash, as int16, are at least `least`."""
    chosen = torch.empty(len(sample), count, dtype=torch.bool, device=sample.device)
    if chosen.numel():
        grid = (len(sample), triton.cdiv(count, NUMBERS))
        _kept[grid](sample.contiguous(), chosen, state, count, least, NUMBERS)
    return chosen


@triton.jit
def _kept(sample, chosen, state, count, least, block: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1).to(tl.int64) * block + tl.arange(0, block)
    words = _mix_in(_mix_in(state.to(tl.uint64), tl.load(sample + row)), number // 4)  # memory is the limit, not this
    bits = (words >> ((number % 4) * 16).to(tl.uint64)).to(tl.int16, bitcast=False)
    tl.store(chosen + row * count + number, bits.to(tl.int32) >= least, mask=number < count)


@triton.jit
def _mix_in(state, key):  # type: ignore[no-untyped-def]
    state = (state + key.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)
