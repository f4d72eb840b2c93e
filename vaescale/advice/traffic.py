"""The collectives of one training step, from the settings: which, how many, how many bytes.

What DeepSpeed 0.19.8 does, as tests/integration/test_traffic.py counts it on two ranks:

- ZeRO 0 all-reduces the gradients once a step, in fp32 at every precision: in our own buckets during the backward pass,
  or in DeepSpeed's after it if a setting of its reduction is passed (average.py).
- ZeRO 1 all-reduces the whole gradient too, not only each rank's shard (`use_multi_rank_bucket_allreduce`), and gathers
  the updated weights. So it moves 1.5 times as much as ZeRO 0. With fp16, both are 2 bytes an entry.
- ZeRO 2 all-reduces the whole gradient after every micro-batch.
"""

import math
from typing import NamedTuple

from torch import nn

from ..interfaces import KLWeighted, Reconstructor
from ..nn.quantize import VectorQuantizer
from ..nn.quantizer import Quantizer
from ..settings import Config, build_critic
from ..training.average import averages, bucketed

SUM, GATHER = "all-reduce", "all-gather"
BUCKET_ENTRIES = 500_000_000  # of DeepSpeed by default; at stage 0 always
ALIGNED = 2  # DeepSpeed pads the flat weights to a multiple of this many entries per rank


class Collective(NamedTuple):
    what: str
    kind: str
    bytes: float  # per step: of the sum, or of the gathered result
    calls: float  # per step
    overlaps: bool = False  # with the backward pass, in part


def traffic(model: nn.Module, config: Config, world: int) -> list[Collective]:
    """Returns the collectives of a step on this many ranks, with a critic those of a step with the adversarial term;
    those of a reset of codes are averaged over the steps."""
    found = _of_engine(model, config, world)
    if size := statistics_bytes(model):
        found.append(Collective("codebooks, rates", SUM, size, 1))
    if critic := build_critic(config):
        found += [one._replace(what=f"critic: {one.what}") for one in _of_engine(critic, config, world)]
        if config.adversarial.lecam:
            found.append(Collective("critic: mean logits", SUM, 8, 1))
        if config.adversarial.adaptive and isinstance(model, Reconstructor):
            size = 2 * 4 * model.last_layer.get_parameter("weight").numel()
            found.append(
                Collective("gradients of the last layer", SUM, config.accumulation * size, config.accumulation)
            )
    return found


def _of_engine(model: nn.Module, config: Config, world: int) -> list[Collective]:
    """Returns the collectives of one engine."""
    found = []
    weights = sum(p.numel() for p in model.parameters() if p.requires_grad)
    sharded, half = config.zero_stage > 0, config.precision == "fp16"
    width = 2 if sharded and half else 4
    if weights:
        passes = config.accumulation if config.zero_stage == 2 else 1
        calls = passes * _buckets(model, config)
        overlaps = averages(config.zero_stage, config.deepspeed)
        found.append(Collective("gradients", SUM, passes * width * weights, calls, overlaps))
    if weights and sharded:
        padded = math.ceil(weights / (ALIGNED * world)) * ALIGNED * world
        found.append(Collective("weights", GATHER, width * padded, 1))
        found.append(Collective("gradient norm", SUM, 4, 1))
    if weights and half:
        found.append(Collective("finite losses", SUM, 8, 1))
        if sharded:
            found.append(Collective("overflow", SUM, 1, 1))
    return found


def _buckets(model: nn.Module, config: Config) -> int:
    """Returns the number of all-reduces of a pass, in our own buckets or in DeepSpeed's."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if averages(config.zero_stage, config.deepspeed):
        return len(bucketed(weights))
    passed = config.deepspeed.get("zero_optimization") or {}
    size = passed.get("reduce_bucket_size", BUCKET_ENTRIES) if config.zero_stage else BUCKET_ENTRIES
    return math.ceil(sum(p.numel() for p in weights) / size)


def statistics_bytes(model: nn.Module) -> float:
    """Returns the bytes of the one sum of a model's own update: counts and sums of rows by code, candidates in steps
    with a reset, and the rates of levels."""
    size = 0.0
    for part in model.modules():
        if isinstance(part, VectorQuantizer):
            size += 4 * (part.codebook.numel() + len(part.codebook))
            if part.config.reset_every:
                size += 4 * part.codebook.numel() / part.config.reset_every
        elif isinstance(part, Quantizer) and "tally" in part._modules:
            size += 4 * part.sizes[0]
    if isinstance(model, KLWeighted):
        size += 4 * sum(buffer.numel() for name, buffer in model.named_buffers() if name == "rates")
    return size
