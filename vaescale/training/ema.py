"""Averaged weights."""

import copy

import torch
from torch import Tensor

from ..interfaces import Model


class WeightEMA:
    """A second copy of the model whose parameters are moving averages, in fp32, and whose buffers are copies.

    The codebook is copied, not averaged: it already is an average, and a reset code must not lag behind its reset.
    A model without parameters is no copy but the model itself.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self._averaging = any(True for _ in model.parameters())
        self.model = copy.deepcopy(model).eval().requires_grad_(False) if self._averaging else model
        self.decay = decay
        self._averages: list[Tensor] = list(self.model.parameters())
        self._copies = list(self.model.buffers())

    @torch.no_grad()
    def update(self, model: Model, step: int) -> None:
        """decay rises to its value as (1 + t) / (10 + t), so that the start is soon forgotten."""
        if not self._averaging:
            return
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach().float() for p in model.parameters()]
        torch._foreach_lerp_(self._averages, weights, 1 - decay)
        if self._copies:  # torch takes no empty list
            torch._foreach_copy_(self._copies, list(model.buffers()))
