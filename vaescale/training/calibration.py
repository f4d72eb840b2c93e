"""Measures the statistics of a model over the training set, once its training has ended."""

from collections.abc import Callable

import torch

from .. import distributed
from ..data import stream
from ..interfaces import Calibrated
from ..numerics import exact


@torch.no_grad()
@exact()
def calibrate(
    model: Calibrated,
    images: stream.TrainingOnce,
    device: torch.device,
    micro: int,
    stopped: Callable[[], object] = lambda: False,
    watched: bool = False,
) -> int:
    """Measures the model's statistics on all images, each once over all ranks. Returns the number of damaged images,
    which were left out; −1 if it was stopped. `micro`: images at a time per rank.

    The sums are fp64. Collective; all ranks get the same bits. `stopped` is called after each batch, equally often on
    all ranks, and must return the same on all; if it is true, the model is not changed.
    """
    # A rank without images still needs the number of sums.
    sums = torch.zeros_like(model.calibration_sums(stream.blank(images).to(device)))
    damaged = torch.zeros(1, dtype=torch.float64, device=device)
    for decoded in stream.once(images, micro, device, "calibrate", watched, leave=False):
        if decoded:
            if len(decoded.batch.x):
                sums += model.calibration_sums(decoded.batch)
            damaged += len(decoded.damage)
        if stopped():
            return -1
    model.calibrate(distributed.sum_(sums))
    return int(distributed.sum_(damaged))
