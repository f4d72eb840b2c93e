"""Measures the mean and the standard deviation of a model's latents over the training set."""

from collections.abc import Callable

import torch

from .. import distributed
from ..data import stream
from ..interfaces import LatentStatistics
from ..numerics import exact


def measured(model: LatentStatistics) -> bool:
    """Returns whether the statistics are there."""
    return all(bool(each.isfinite().all()) for each in model.latent_statistics())


@torch.no_grad()
@exact()
def measure(
    model: LatentStatistics,
    images: stream.TrainingOnce,
    device: torch.device,
    micro: int,
    stopped: Callable[[], object] = lambda: False,
    watched: bool = False,
) -> int:
    """Sets the model's statistics of its latents, from all images, each once over all ranks. Returns the number of
    damaged images, which were left out; −1 if it was stopped. `micro`: images at a time per rank.

    They are those of the draws z ~ q(z|x), but nothing is drawn: E z = E μ and Var z = E (μ² + σ²) − (E μ)², with the
    mean μ and the deviation σ of q. The sums are fp64. Collective; all ranks get the same bits. `stopped` is called
    after each batch, equally often on all ranks, and must return the same on all; if it is true, the model is not
    changed.
    """
    held_mean, held_std = model.latent_statistics()
    size = len(held_mean)
    sums = torch.zeros(2 * size + 2, dtype=torch.float64, device=device)  # of μ, of μ² + σ², places, damaged images
    for decoded in stream.once(images, micro, device, "latents", watched, leave=False):
        if decoded:
            mean, std = (part.double().transpose(0, 1).flatten(1) for part in model.posterior(decoded.batch))
            sums[:size] += mean.sum(1)
            sums[size:-2] += (mean.square() + std.square()).sum(1)
            sums[-2] += mean.shape[1]
            sums[-1] += len(decoded.damage)
        if stopped():
            return -1
    first, second, (places, damaged) = distributed.sum_(sums).split([size, size, 2])
    held_mean.copy_(first / places)
    held_std.copy_((second / places - (first / places).square()).clamp(min=0).sqrt())
    return int(damaged)
