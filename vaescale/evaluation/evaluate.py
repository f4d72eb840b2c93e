"""Any Codec, measured over a validation set, each sample exactly once over all ranks."""

import math
from collections.abc import Callable
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import distributed
from ..data import stream
from ..interfaces import Batch, Codec, Tensors
from ..monitoring.pictures import to_bytes
from . import metrics
from .metrics.metric import Seen

IMAGES = "largest centred square, bicubic to the model's size, each exactly once"


@torch.no_grad()
def evaluate(
    codec: Codec,
    slices: stream.ValidationSlices,
    device: torch.device,
    micro: int = 32,
    draws: int = 1,
    watched: bool = False,
    stopped: Callable[[], object] = lambda: False,
) -> dict[str, Any]:
    """The numbers of all METRICS that are for this codec, by name. `micro`: images at a time on one rank; `draws`:
    latents drawn for each image, where any are.

    Collective; the same result on all ranks. Memory does not grow with `draws`, time does. `stopped` is asked after
    each batch, equally often on all ranks, and must answer all alike: if it says so, the rest is left and {} returned.
    """
    rank, world = distributed.rank(), distributed.world()
    loader = stream.validation_loader(slices, micro, rank, world, device.type == "cuda")
    # A rank without images, where there are fewer than ranks, must know the names and shapes of what the others sum.
    first = _measure(codec, slices[range(1)].batch.to(device), min(draws, 2))
    totals = [{name: torch.zeros_like(part, dtype=torch.float64) for name, part in sums.items()} for sums in first]
    images = len(slices.samples.index)
    batches = range(math.ceil(math.ceil(images / world) / micro))  # of the rank that has most
    for _, decoded in tqdm(zip_longest(batches, loader), "evaluate", len(batches), unit="batch", disable=not watched):
        if decoded:
            for total, sums in zip(totals, _measure(codec, decoded.batch.to(device), draws), strict=True):
                for name, part in sums.items():
                    total[name] += part
        if stopped():
            return {}
    result: dict[str, Any] = {"images": images}
    for metric, total in zip(metrics.METRICS, totals, strict=True):
        if total:
            result |= metric.result({name: distributed.sum_(part) for name, part in total.items()}, images)
    return result


def protocol() -> dict[str, str]:
    """How all that may be in a result is measured."""
    return {"images": IMAGES} | {name: text for metric in metrics.METRICS for name, text in metric.protocol.items()}


@torch.no_grad()
def reconstruct(codec: Codec, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Its images' reconstructions, uint8 [B, C, H, W], and the latents."""
    latents = codec.encode(batch)
    return to_bytes(codec.decode(latents, batch.condition)), latents


def _measure(codec: Codec, batch: Batch, draws: int) -> list[Tensors]:
    """The sums of each of the METRICS over these images."""
    y, latents = reconstruct(codec, batch)
    return [metric.sums(Seen(codec, batch, y, latents, draws)) for metric in metrics.METRICS]
