"""Averaged weights."""

import copy

import torch
from torch import Tensor

from ..interfaces import Model
from .engine import Masters


class WeightEMA:
    """A second copy of the model whose parameters are moving averages, in fp32, and whose buffers are copies.

    The codebook is copied, not averaged: it already is an average, and a reset code must not lag behind its reset.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.decay = decay
        self._averages: list[Tensor] = list(self.model.parameters())
        self._copies = list(self.model.buffers())
        self._masters: Masters | None = None

    def follow(self, masters: Masters | None) -> None:
        """Go on from what `model` holds, and average this rank's parts of the fp32 masters where the model's own
        weights are half."""
        if masters:
            self._masters = masters
            self._averages = masters.scatter(list(self.model.parameters()))

    @torch.no_grad()
    def update(self, model: Model, step: int, skipped: Tensor) -> None:
        """decay rises to its value as (1 + t) / (10 + t), so that the start is soon forgotten.

        skipped: fp32 [], on the device: 1 where the optimiser did not move, and neither do the averages. The
        differences take as much memory as the gradients, which are freed by now.
        """
        weight = 1 - min(self.decay, (1 + step) / (10 + step))
        weights = self._masters.parts if self._masters else [p.detach().float() for p in model.parameters()]
        # A lerp with a weight on the device would be one kernel a parameter.
        differences = torch._foreach_sub(weights, self._averages)
        torch._foreach_mul_(differences, weight * (1 - skipped))
        torch._foreach_add_(self._averages, differences)
        if self._copies:  # torch takes no empty list
            torch._foreach_copy_(self._copies, list(model.buffers()))

    @torch.no_grad()
    def settle(self) -> None:
        """Called before `model` is read: bring together what each rank has averaged. Collective."""
        if self._masters:
            for parameter, average in zip(self.model.parameters(), self._masters.gather(self._averages), strict=True):
                parameter.copy_(average)
