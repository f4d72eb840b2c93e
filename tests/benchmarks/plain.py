"""A training step as one would write it by hand, which benchmarks compare with."""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from vaescale.settings import Config


def plain_learner(model: nn.Module, config: Config) -> Callable[[Tensor], None]:
    """Returns a function that learns from a loss as one would write it by hand: AdamW, clipping and averaged weights,
    with the settings of the config."""
    averaged = copy.deepcopy(model)
    one = config.optimizer
    adam = torch.optim.AdamW(model.parameters(), one.lr, one.betas, weight_decay=one.weight_decay, fused=True)

    def learn(loss: Tensor) -> None:
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), one.grad_clip)
        adam.step()
        adam.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(model.parameters()), 1 - config.ema_decay)

    return learn
