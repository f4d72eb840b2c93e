"""Normal numbers in one CUDA kernel: the function of noise.py, one hash for each pair of numbers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIRS = 1024  # per program; not timed on a GPU


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


@triton.jit
def _mix_in(state, key):  # type: ignore[no-untyped-def]
    state = (state + key.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB
    return state ^ (state >> 31)
