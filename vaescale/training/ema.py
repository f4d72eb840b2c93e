"""Averaged weights."""

import copy

import torch
from torch import Tensor

from ..interfaces import Model
from .buffers import joined
from .gather import Masters


class WeightEMA:
    """A second model whose parameters are exponential moving averages in fp32, and whose buffers are copies. Frozen
    parameters are neither averaged nor copied.

    Codebooks are copied, not averaged: they are averages already, and a reset code must change at once. Statistics of
    the latents are measured for the averages alone; a further step copies the model's, which say "not measured".
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).eval()
        self.decay = decay
        self._averages: list[Tensor] = _trained(self.model)
        self.model.requires_grad_(False)
        self._buffers = joined(self.model)
        self._masters: Masters | None = None

    def follow(self, masters: Masters | None) -> None:
        """Continues from the weights that `model` holds. If the trained model has fp16 weights, averages this
        rank's shards of its fp32 masters instead of its parameters."""
        if masters:
            self._masters = masters
            self._averages = masters.scatter(self.model.parameters())

    @torch.no_grad()
    def update(self, model: Model, buffers: Tensor, step: int, skipped: Tensor) -> None:
        """Moves the averages towards the weights of `model`, and copies its buffers, which `joined` returned.

        The decay starts as (1 + t) / (10 + t) and is capped at its configured value, so the initial weights are soon
        forgotten. skipped: fp32 [] on the device, 1 if the weights did not change; the averages then stay as well. The
        differences take as much memory as the gradients, which have been freed by now.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        weights = self._masters.parts if self._masters else [p.detach().float() for p in _trained(model)]
        # A lerp with a weight on the device would launch one kernel per parameter.
        differences = torch._foreach_sub(weights, self._averages)
        torch._foreach_mul_(differences, weight * (1 - skipped))
        torch._foreach_add_(self._averages, differences)
        self._buffers.copy_(buffers)

    @torch.no_grad()
    def refresh(self) -> None:
        """Gathers the averages of all ranks into `model`. Called before `model` is read. Collective."""
        if self._masters:
            self._masters.gather(self._averages, self.model.parameters())


def _trained(model: Model) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]
