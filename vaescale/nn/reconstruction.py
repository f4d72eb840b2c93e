"""Losses between an image and its reconstruction.

    loss = l1 · mean |r − x| + l2 · mean (r − x)² + perceptual.weight · d(r, x)        pixels in [0, 1]

Published recipes write the first two for pixels in [−1, 1]: their weight of |r − x| is half of `l1`, and that of
(r − x)² a quarter of `l2`. The perceptual distance d is the same (perceptual.py).
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from ..interfaces import Shape
from ..ranges import ranged
from . import perceptual as distances
from .fidelity import fidelity, squared_errors
from .perceptual import Distance


@dataclass(frozen=True)
class Config:
    l1: float = ranged(0.0, least=0)  # weight of the mean absolute error; l1 and l2 both 0: the model's own loss
    l2: float = ranged(0.0, least=0)  # weight of the mean squared error
    perceptual: distances.Config = field(default_factory=distances.Config)

    @property
    def configured(self) -> bool:
        """Whether any weight is set."""
        return bool(self.l1 or self.l2 or self.perceptual.weight)

    def without_files(self) -> "Config":
        return replace(self, perceptual=distances.Config())


class Reconstruction(nn.Module):
    """The loss and metrics of a reconstruction. It has no parameters."""

    def __init__(self, config: Config, shape: Shape, variance: float | None = None) -> None:
        """variance: divides the mean squared error, which is the loss if `l1` and `l2` are 0; None: one of them must be
        set. Raises ValueError for that, and for weights that cannot be read."""
        super().__init__()
        if variance is None and not (config.l1 or config.l2):
            raise ValueError("model.reconstruction needs l1 or l2 above 0: set model.reconstruction.l1=1")
        self.config = config
        self.variance = None if config.l1 or config.l2 else variance
        self.distance: Distance | None = distances.build(config.perceptual, shape.size)

    def forward(self, reconstruction: Tensor, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Both [B, C, H, W]; x uint8, the reconstruction in [0, 1] up to overshoot. Returns the loss, a scalar, and the
        metrics."""
        config, target = self.config, x / 255
        errors = squared_errors(reconstruction, target)
        metrics = fidelity(errors)
        loss = errors.mean() * config.l2 if self.variance is None else errors.mean() / self.variance
        if config.l1:
            absolute = (reconstruction.float() - target).abs().mean()
            metrics["l1"] = absolute.detach()
            loss = loss + config.l1 * absolute
        if self.distance:
            distance = self.distance(reconstruction, target).mean()
            metrics[self.distance.kind] = distance.detach()
            loss = loss + config.perceptual.weight * distance
        return loss, metrics

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Follows the model to another device; the weights keep their data type."""
        super()._apply(fn, recurse)
        if self.distance:
            self.distance.to(fn(self.distance.tensors["mean"]).device)
        return self


def distance_of(model: nn.Module) -> Distance | None:
    """Returns the perceptual distance that a model is trained with, if any."""
    return next((part.distance for part in model.modules() if isinstance(part, Reconstruction)), None)
