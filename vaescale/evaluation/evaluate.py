"""Measures any Codec over a validation set, with each sample exactly once over all ranks."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import distributed
from ..data import stream
from ..interfaces import Batch, Codec, Tensors
from ..monitoring.pictures import to_bytes
from ..nn.perceptual import Distance
from ..numerics import exact
from . import metrics
from .metrics.metric import Seen

IMAGES = "largest centred square, resized (bicubic) to the model's size, each image exactly once"


@torch.no_grad()
def evaluate(
    codec: Codec,
    slices: stream.ValidationSlices,
    device: torch.device,
    micro: int = 32,
    draws: int = 1,
    watched: bool = False,
    stopped: Callable[[], object] = lambda: False,
    distance: Distance | None = None,
    observe: Callable[[Batch, Tensor], None] = lambda batch, reconstruction: None,
) -> dict[str, Any]:
    """Returns the numbers of all METRICS that apply to this codec, by name. `micro`: images at a time per rank;
    `draws`: latents drawn per image, by the metrics that draw any; `distance`: the perceptual distance to measure, on
    the device; `observe`: gets each batch and its reconstruction, uint8 [B, C, H, W], on the device.

    Collective; all ranks return the same result. Time grows with `draws`, memory does not. `stopped` is called after
    each batch, equally often on all ranks, and must return the same on all; if it is true, the result is {}.
    """
    # With fewer images than ranks, a rank without images still needs the names and shapes of the sums.
    first, _ = _measure(codec, slices[range(1)].batch.to(device), min(draws, 2), distance)
    totals = [{name: torch.zeros_like(part, dtype=torch.float64) for name, part in sums.items()} for sums in first]
    images = len(slices.samples.index)
    for decoded in stream.once(slices, micro, device, "evaluate", watched):
        if decoded:
            found, reconstruction = _measure(codec, decoded.batch, draws, distance)
            for total, sums in zip(totals, found, strict=True):
                for name, part in sums.items():
                    total[name] += part
            observe(decoded.batch, reconstruction)
        if stopped():
            return {}
    result: dict[str, Any] = {"images": images}
    for metric, total in zip(metrics.METRICS, totals, strict=True):
        if total:
            result |= metric.result({name: distributed.sum_(part) for name, part in total.items()}, images)
    return result


def protocol() -> dict[str, str]:
    """Returns how each number of a result is measured, by name."""
    texts = [metric.protocol for metric in metrics.METRICS]
    texts += [comparison.protocol for comparison in metrics.COMPARISONS.values()]
    return {"images": IMAGES} | {name: text for protocol in texts for name, text in protocol.items()}


@torch.no_grad()
@exact()
def reconstruct(codec: Codec, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    """Returns the reconstructions of the batch, uint8 [B, C, H, W], and its latents."""
    latents = codec.encode(batch)
    return to_bytes(codec.decode(latents, batch.condition)), latents


@exact()
def _measure(codec: Codec, batch: Batch, draws: int, distance: Distance | None) -> tuple[list[Tensors], Tensor]:
    """(the sums of each of the METRICS over the images of this batch, their reconstructions)."""
    y, latents = reconstruct(codec, batch)
    return [metric.sums(Seen(codec, batch, y, latents, draws, distance)) for metric in metrics.METRICS], y
